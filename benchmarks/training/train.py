"""Train an image classifier: any timm model, on a folder, parquet files or a timm dataset; resumable and reproducible.

    python benchmarks/training/train.py test_crossformer --data DIR --output DIR --recipe small
    torchrun --nproc-per-node 8 benchmarks/training/train.py crossformer_small --data DIR --output DIR --recipe imagenet

Run the same command again to go on after an interruption. Every random number follows from the seed, the step and the
sample, so a checkpoint needs no generator's state: on a CPU, a run that was killed ends exactly like one that was not.

In --output: checkpoint.pt, log.csv, plot.svg, config.json, and at the end model.safetensors (the EMA weights if any).
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from records import add_row, describe_run, save_atomically, write_log
from samples import Images, seed_from, stage_of
from timm.data import Mixup, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_crossformer  # noqa: F401  registers the models

# `imagenet` is the official training of CrossFormer on ImageNet-1k; `small` is for small images and short runs.
RECIPES: Dict[str, Dict[str, Any]] = {
    'imagenet': dict(
        epochs=300, warmup_epochs=20, batch_size=1024, lr=5e-4, warmup_lr=5e-7, min_lr=5e-6, weight_decay=0.05,
        clip_grad=5., smoothing=0.1, mixup=0.8, cutmix=1., auto_augment='rand-m9-mstd0.5-inc1', color_jitter=0.4,
        random_erasing=0.25, augment='timm', scale=0.08, img_size=224, crop_pct=0.875,
    ),
    'small': dict(
        epochs=30, warmup_epochs=1, batch_size=128, lr=2e-3, warmup_lr=1e-5, min_lr=1e-5, weight_decay=0.05,
        clip_grad=5., smoothing=0.1, augment='batch', scale=0.5, ema_decay=0.998,
    ),
}

# Stochastic depth of the official ImageNet training.
DROP_PATH = {
    'crossformer_tiny': 0.1, 'crossformer_small': 0.2, 'crossformer_base': 0.3, 'crossformer_large': 0.5,
    'crossformer_pp_small': 0.2, 'crossformer_pp_base': 0.3, 'crossformer_pp_large': 0.5, 'crossformer_pp_huge': 0.5,
}

# A run may be resumed with other values of these: they do not change its result.
FREE_ARGUMENTS = (
    'data', 'output', 'checkpoint_steps', 'checkpoint_minutes', 'workers', 'local_rank', 'rank',
    'distributed', 'summary',
)



def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line; a recipe sets defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('model', help='timm model name')
    parser.add_argument('--data', required=True, help='folder with train.parquet, or root of --dataset')
    parser.add_argument('--dataset', default='', help="timm dataset, as 'torch/cifar10'; default: one folder per class")
    parser.add_argument('--output', required=True, help='folder to write to, and to resume from')
    parser.add_argument('--recipe', choices=sorted(RECIPES), default='small', help='sets defaults of what follows')
    parser.add_argument('--train-split', default='train')
    parser.add_argument('--val-split', default='validation')
    parser.add_argument('--train-limit', type=int, help='train on a random subset of this many images')
    parser.add_argument('--val-limit', type=int, help='validate on a random subset of this many images')
    parser.add_argument('--num-classes', type=int, help='default: as many as the dataset has')
    parser.add_argument('--model-kwargs', type=json.loads, default={}, help='JSON object of constructor arguments')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--zero', metavar='PART', help='keep parameters at zero whose name contains this')
    parser.add_argument('--drop-path', type=float, help="default: the official rate with the recipe 'imagenet', else 0")
    parser.add_argument('--img-size', type=int, default=32, help='size of validation, and of training')
    parser.add_argument(
        '--train-sizes', type=lambda text: [int(size) for size in text.split(',')],
        help='sizes of equally long stages of training, as 32,48')
    parser.add_argument('--crop-pct', type=float, default=1., help='part of the resized image that validation keeps')
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--warmup-epochs', type=int)
    parser.add_argument('--batch-size', type=int, help='over all ranks')
    parser.add_argument('--opt', default='adamw')
    parser.add_argument('--lr', type=float)
    parser.add_argument('--warmup-lr', type=float)
    parser.add_argument('--min-lr', type=float)
    parser.add_argument('--weight-decay', type=float, help='not of biases and one-dimensional parameters')
    parser.add_argument('--layer-decay', type=float, help='factor of the learning rate per layer, downwards')
    parser.add_argument('--clip-grad', type=float)
    parser.add_argument('--smoothing', type=float)
    parser.add_argument('--mixup', type=float, default=0.)
    parser.add_argument('--cutmix', type=float, default=0.)
    parser.add_argument('--mixup-prob', type=float, default=1., help='part of the batches that are mixed')
    parser.add_argument('--mixup-off-epoch', type=int, help='first epoch without mixup and cutmix')
    parser.add_argument(
        '--augment', choices=('timm', 'batch'), help="'batch': shift and flip of small images of one size, in memory")
    parser.add_argument('--auto-augment')
    parser.add_argument('--color-jitter', type=float, default=0.)
    parser.add_argument('--random-erasing', type=float, default=0.)
    parser.add_argument('--scale', type=float, help='least area of a random crop')
    parser.add_argument('--ema-decay', type=float, default=0., help='0: no averaged weights')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--eval-epochs', type=int, default=1, help='validate after every so many epochs')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', choices=('auto', 'on', 'off'), default='auto', help='bf16; auto: on CUDA only')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--workers', type=int, default=0, help='processes that load data; 0: this one')
    parser.add_argument('--checkpoint-steps', type=int, default=0, help='save every so many steps; 0: by time only')
    parser.add_argument('--checkpoint-minutes', type=float, default=5.)
    parser.add_argument('--summary', help='CSV file to add a row to at the end: the settings and what came out')
    recipe = parser.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES[recipe])
    args = parser.parse_args(argv)
    if args.drop_path is None:
        args.drop_path = DROP_PATH.get(args.model.split('.')[0], 0.) if recipe == 'imagenet' else 0.
    return args


def train(args: argparse.Namespace) -> Dict[str, Any]:
    """Train until the last epoch, from the checkpoint in the output folder if there is one; return the last row."""
    run = Run(args)
    run.resume()
    while run.step < run.last_step:
        run.train_epoch()
        run.end_epoch()
    run.finish()
    return run.rows[-1]


class Run:
    """A training run: images, model, optimizer, and how far it is."""

    def __init__(self, args: argparse.Namespace):
        """
        Args:
            args: Of the command line.

        Raises:
            ValueError: An argument is out of range, or does not suit the images.
        """
        torch.set_num_threads(args.threads)
        self.args = args
        self.device = torch.device(init_distributed_device(args))  # sets args.rank, world_size, distributed
        self.is_main = args.rank == 0
        if args.batch_size % args.world_size:
            raise ValueError(
                '`--batch-size` counts all ranks and must be a multiple of them, got '
                f'{args.batch_size} for {args.world_size} ranks.')
        self.amp = args.amp == 'on' or (args.amp == 'auto' and self.device.type == 'cuda')
        self.folder = Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.folder / 'checkpoint.pt'

        self.images = Images(args)
        self.model = self._create_model()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        inputs = resolve_model_data_config(self.model)
        self.images.transform(inputs['mean'], inputs['std'])
        self.ema = ModelEmaV3(self.model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
        self.optimizer = create_optimizer_v2(
            self.model, args.opt, lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr, min_lr=args.min_lr, step_on_epochs=False, updates_per_epoch=self.images.steps)
        self.mixup = Mixup(
            args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=0.5, label_smoothing=args.smoothing,
            num_classes=self.images.num_classes,
        ) if args.mixup or args.cutmix else None

        self.settings = {k: v for k, v in vars(args).items() if k not in FREE_ARGUMENTS}
        self.settings.update(
            num_classes=self.images.num_classes, parameters=self.parameters, train_images=len(self.images.indices),
            device=self.device.type)
        self.last_step = self.images.steps * args.epochs
        self.step = 0
        self.rows: List[Dict[str, Any]] = []  # of the log, one per epoch
        self.loss_sum: Any = 0.  # of the steps of an unfinished epoch
        self.clock = Clock()

    def _create_model(self) -> torch.nn.Module:
        args = self.args
        kwargs = dict(args.model_kwargs)
        if args.drop_path:
            kwargs['drop_path_rate'] = args.drop_path
        seed_from('model', args.seed)
        model = timm.create_model(
            args.model, pretrained=args.pretrained, num_classes=self.images.num_classes, **kwargs).to(self.device)
        if args.zero:
            keep_at_zero(model, args.zero)
        return model

    @property
    def averaged(self) -> torch.nn.Module:
        """The model with the averaged weights, if they are averaged."""
        return self.ema.module if self.ema else self.model

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: It comes from a run with other arguments.
        """
        if self.checkpoint.is_file():
            self._load()
            if self.is_main:
                print(f'Going on from step {self.step} of {self.last_step}.', flush=True)
        elif self.is_main:
            describe_run(self.folder, self.settings)
        self.net = self.model  # what is called in training
        if self.args.distributed:
            self.net = torch.nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device.index] if self.device.type == 'cuda' else None)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        changed = sorted(k for k in self.settings if state['settings'].get(k) != self.settings[k])
        if changed:
            raise ValueError(
                f'{self.checkpoint} comes from a run with other values of {", ".join(changed)}. '
                'Repeat its arguments to go on, or choose another `--output`.')
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        if self.ema:
            self.ema.module.load_state_dict(state['ema'])
        self.step, self.rows, self.loss_sum = state['step'], state['rows'], state['loss_sum']
        self.clock = Clock(state['seconds'], state['cpu_seconds'])

    def save(self) -> None:
        """Write the checkpoint."""
        if self.is_main:
            save_atomically(dict(
                settings=self.settings, step=self.step, rows=self.rows, loss_sum=float(self.loss_sum),
                seconds=self.clock.seconds(), cpu_seconds=self.clock.cpu_seconds(), model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(), ema=self.ema.module.state_dict() if self.ema else None,
            ), self.checkpoint)
        self.clock.mark()

    def train_epoch(self) -> None:
        """Train to the end of the epoch, and save on the way when it is time."""
        args, steps = self.args, self.images.steps
        epoch, first = divmod(self.step, steps)
        mixup = self.mixup if args.mixup_off_epoch is None or epoch < args.mixup_off_epoch else None
        self.net.train()
        bar = tqdm(
            self.images.train_loader(epoch, first), desc=f'epoch {epoch}', initial=first, total=steps,
            disable=None if self.is_main else True, leave=False)
        for images, labels in bar:
            loss = self.train_step(images, labels, mixup)
            if self.step % 50 == 0:
                if not math.isfinite(loss.item()):
                    raise RuntimeError(
                        f'The loss is {loss.item()} at step {self.step}. Lower `--lr`, or switch `--amp` off.')
                bar.set_postfix(loss=f'{loss.item():.3f}')
            due = args.checkpoint_steps and self.step % args.checkpoint_steps == 0
            if self.step % steps and (due or self.clock.since_mark() > 60 * args.checkpoint_minutes):
                self.save()

    def train_step(self, images: torch.Tensor, labels: torch.Tensor, mixup: Optional[Mixup]) -> torch.Tensor:
        """Take one step on a batch of this rank; return its loss."""
        args = self.args
        self.scheduler.step_update(self.step)
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        seed_from('step', args.seed, args.rank, self.step)
        if mixup:
            images, labels = mixup(images, labels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.net(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0. if mixup else args.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.step += 1
        if self.ema:
            self.ema.update(self.model, self.step)
        self.loss_sum = self.loss_sum + loss.detach()
        return loss

    def end_epoch(self) -> None:
        """Validate if it is time, then save and log the epoch that just ended."""
        args, sizes = self.args, self.images.sizes
        epoch = self.step // self.images.steps  # from 1 up
        row: Dict[str, Any] = dict(
            epoch=epoch, img_size=sizes[stage_of(epoch - 1, args.epochs, len(sizes))],
            lr=f'{self.optimizer.param_groups[0]["lr"]:.3e}', train_loss=round(self._train_loss(), 4), val_loss='',
            accuracy='',
        )
        if epoch % args.eval_epochs == 0 or epoch == args.epochs:
            val_loss, accuracy = evaluate(self.averaged, self.images.val_loader(), self.device, self.amp)
            row.update(val_loss=round(val_loss, 4), accuracy=round(accuracy, 2))
        # Of this process.
        row.update(seconds=round(self.clock.seconds(), 1), cpu_seconds=round(self.clock.cpu_seconds(), 1))
        self.rows.append(row)
        self.loss_sum = 0.
        self.save()
        if self.is_main:
            print(', '.join(f'{k} {v}' for k, v in row.items() if v != ''), flush=True)
            write_log(self.rows, self.folder, f'{args.model}, {self.parameters / 1e6:.2f} M parameters')

    def _train_loss(self) -> float:
        """Return the mean loss of the epoch over all ranks."""
        loss = torch.as_tensor(float(self.loss_sum) / self.images.steps, device=self.device)
        if self.args.distributed:
            dist.all_reduce(loss)
            loss = loss / self.args.world_size
        return loss.item()

    def finish(self) -> None:
        """Write the weights and the row of the summary, and leave the other ranks."""
        if self.is_main and self.args.summary:
            add_row(Path(self.args.summary), dict(self.rows[-1], **self.settings))
        if self.is_main:
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.averaged.state_dict().items()}
            safetensors.torch.save_file(tensors, self.folder / 'model.safetensors', metadata={'format': 'pt'})
        if self.args.distributed:
            dist.destroy_process_group()


class Clock:
    """Seconds of a run, those before an interruption included."""

    def __init__(self, seconds: float = 0., cpu_seconds: float = 0.):
        self.start = time.perf_counter() - seconds
        self.cpu_start = time.process_time() - cpu_seconds
        self.mark()

    def seconds(self) -> float:
        """Of the clock on the wall."""
        return time.perf_counter() - self.start

    def cpu_seconds(self) -> float:
        """Of this process."""
        return time.process_time() - self.cpu_start

    def mark(self) -> None:
        """Remember the present moment."""
        self.marked = time.perf_counter()

    def since_mark(self) -> float:
        """Seconds since the last mark."""
        return time.perf_counter() - self.marked


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, device: torch.device, amp: bool) -> Tuple[float, float]:
    """Return the mean loss and the top-1 accuracy in per cent over the images of all ranks."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        logits = logits.float()
        totals[0] += F.cross_entropy(logits, labels, reduction='sum').item()
        totals[1] += (logits.argmax(1) == labels).sum().item()
        totals[2] += len(labels)
    if dist.is_initialized():
        totals = totals.to(device)
        dist.all_reduce(totals)
    return (totals[0] / totals[2]).item(), (100 * totals[1] / totals[2]).item()


def keep_at_zero(model: torch.nn.Module, part: str) -> None:
    """Set the parameters whose name contains `part` to zero, and train them no more."""
    found = [p for name, p in model.named_parameters() if part in name]
    if not found:
        raise ValueError(f'`--zero` needs a part of the name of a parameter, got {part!r}, which is in none.')
    for p in found:
        torch.nn.init.zeros_(p).requires_grad_(False)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run from the command line."""
    train(parse_args(argv))
    return 0


if __name__ == '__main__':
    sys.exit(main())
