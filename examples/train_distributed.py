"""Train on several processes with DDP or FSDP2, save a sharded checkpoint, and resume from it.

    torchrun --nproc-per-node 2 examples/train_distributed.py                           # DDP, CPU (gloo)
    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy fsdp           # FSDP2, CPU (gloo)
    torchrun --nproc-per-node 8 examples/train_distributed.py --strategy fsdp --backend nccl --model crossformer_base

Images are noise, brighter on the left or on the right. --accumulate steps are summed without synchronisation,
--checkpointing recomputes activations, --checkpoint DIR saves there at the end and resumes from there at the start.
Prints the loss and the accuracy on fresh images.
"""
import argparse
import contextlib
import os

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import timm_crossformer  # noqa: F401  registers the models
from timm_crossformer.model import CrossFormerBlock


def shard(model):
    """Wrap policy: every block by itself, what is left (stem, downsampling, norm, head) together with the root."""
    for module in model.modules():
        if isinstance(module, CrossFormerBlock):
            fully_shard(module)
    return fully_shard(model)


def batch(count, generator, device):
    """Draw noisy images that are brighter on the left (class 0) or on the right (class 1)."""
    labels = torch.randint(2, (count,), generator=generator)
    ramp = torch.linspace(-1, 1, 96) * (2 * labels[:, None] - 1)
    images = torch.randn(count, 3, 64, 96, generator=generator) + ramp[:, None, None, :]
    return images.to(device), labels.to(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_crossformer', help='any CrossFormer')
    parser.add_argument('--strategy', default='ddp', choices=['ddp', 'fsdp'])
    parser.add_argument('--backend', default='gloo', choices=['gloo', 'nccl'])
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--accumulate', type=int, default=1)
    parser.add_argument('--checkpointing', action='store_true')
    parser.add_argument('--checkpoint', help='folder of the sharded checkpoint')
    args = parser.parse_args()
    dist.init_process_group(args.backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device('cpu')
    if args.backend == 'nccl':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=2).to(device)
    model.set_grad_checkpointing(args.checkpointing)
    model = shard(model) if args.strategy == 'fsdp' else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=.05)  # after sharding
    if args.checkpoint and os.path.isdir(args.checkpoint):
        state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({'model': state, 'optimizer': optimizer_state}, checkpoint_id=args.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
        if rank == 0:
            print(f'resumed from {args.checkpoint}')

    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        for part in range(args.accumulate):
            images, labels = batch(8, generator, device)
            last = part == args.accumulate - 1
            if args.strategy == 'fsdp':
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or args.strategy == 'fsdp' else model.no_sync():
                loss = F.cross_entropy(model(images), labels)
                (loss / args.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 0:
            print(f'step {step:3d}  loss {loss.item():.3f}', flush=True)

    if args.checkpoint:
        state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({'model': state, 'optimizer': optimizer_state}, checkpoint_id=args.checkpoint)
    model.eval()
    images, labels = batch(64, generator, device)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).sum()
    dist.all_reduce(right)
    if rank == 0:
        print(f'{args.strategy} on {world} processes: {right.item() / (64 * world):.3f} of fresh images right')
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
