"""Train an image classifier: any timm model, on a folder, parquet files or a timm dataset; resumable and reproducible.

    python benchmarks/train.py test_crossformer --data DIR --output DIR --recipe small
    torchrun --nproc-per-node 8 benchmarks/train.py crossformer_small --data IMAGENET --output DIR --recipe imagenet

Run the same command again to go on after an interruption. Every random number follows from the seed, the step and the
sample, so a checkpoint needs no generator's state: on a CPU, a run that was killed ends exactly like one that was not.

In --output: checkpoint.pt, log.csv, plot.svg, config.json, and at the end model.safetensors (the EMA weights if any).
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_dataset, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import timm_crossformer  # registers the models

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

# Columns of --summary.
SUMMARY = (
    'model', 'train_images', 'train_sizes', 'img_size', 'epochs', 'batch_size', 'opt', 'lr', 'warmup_epochs',
    'weight_decay', 'clip_grad', 'smoothing', 'mixup', 'cutmix', 'mixup_prob', 'drop_path', 'ema_decay', 'amp', 'seed',
    'train_loss', 'val_loss', 'accuracy', 'cpu_seconds',
)


class ParquetImages(Dataset):
    """Images of one parquet file: a column `image` with encoded bytes and a column `label`."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path, columns=['image', 'label'])
        self.encoded = [row['bytes'] for row in table['image'].to_pylist()]
        self.labels: List[int] = table['label'].to_pylist()
        self.num_classes = max(self.labels) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.encoded[index])).convert('RGB'), self.labels[index]


def open_dataset(args: argparse.Namespace, split: str) -> Tuple[Dataset, int]:
    """Return a dataset of (PIL image, label) and its number of classes, 0 if it does not tell."""
    parquet = Path(args.data) / f'{split}.parquet'
    if parquet.is_file():
        dataset: Any = ParquetImages(parquet)
        return dataset, dataset.num_classes
    dataset = create_dataset(args.dataset, root=args.data, split=split)
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return dataset, len(classes) if classes else 0


def seed_from(*parts: Any) -> None:
    """Seed Python, NumPy and torch from any values."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], 'little')
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Samples(Dataset):
    """Transformed images by (epoch, index), both of which decide the augmentation. The epoch also decides the size."""

    def __init__(self, dataset: Dataset, transforms: Sequence[Any], epochs: int, seed: int):
        self.dataset = dataset
        self.transforms = transforms
        self.epochs = epochs
        self.seed = seed

    def __getitem__(self, key: Tuple[int, int]) -> Tuple[torch.Tensor, int]:
        epoch, index = key
        image, label = self.dataset[index]
        seed_from('sample', self.seed, epoch, index)
        return self.transforms[stage_of(epoch, self.epochs, len(self.transforms))](image), label


class BatchSamples(Dataset):
    """Like `Samples`, for small images of one size: decoded once, kept in memory, and augmented by whole batches.

    Augmentation is a shift by up to an eighth of the side and a flip; what it takes is microseconds per image.
    """

    def __init__(
            self, dataset: Dataset, sizes: Sequence[int], epochs: int, seed: int, mean: Sequence[float],
            std: Sequence[float], is_training: bool,
    ):
        images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        if len({image.size for image in images}) != 1:
            raise ValueError("`--augment batch` needs images of one size, got several. Choose `--augment timm`.")
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        self.images = pixels.permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(labels)
        self.sizes, self.epochs, self.seed, self.is_training = sizes, epochs, seed, is_training
        self.mean = 255 * torch.tensor(mean)[:, None, None]
        self.std = 255 * torch.tensor(std)[:, None, None]

    def __getitems__(self, keys: List[Tuple[int, int]]) -> Tuple[torch.Tensor, torch.Tensor]:
        epoch = keys[0][0]
        index = torch.tensor([i for _, i in keys])
        x = self.images[index].float()
        if self.is_training:
            seed_from('batch', self.seed, epoch, keys[0][1])
            x = shift_and_flip(x)
        x = (x - self.mean) / self.std
        size = self.sizes[stage_of(epoch, self.epochs, len(self.sizes))]
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode='bicubic', antialias=True)
        return x, self.labels[index]


def shift_and_flip(x: torch.Tensor) -> torch.Tensor:
    """Shift each of the images [B, C, H, W] by up to an eighth of its side, mirroring the border; flip half of them."""
    count, _, height, width = x.shape
    reach = max(height, width) // 8
    x = F.pad(x, (reach,) * 4, mode='reflect')
    rows = torch.randint(0, 2 * reach + 1, (count, 1)) + torch.arange(height)
    cols = torch.randint(0, 2 * reach + 1, (count, 1)) + torch.arange(width)
    cols = torch.where(torch.rand(count, 1) < 0.5, cols.flip(1), cols)
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def stage_of(epoch: int, epochs: int, stages: int) -> int:
    """Return which of equally long stages an epoch belongs to."""
    return min(epoch * stages // epochs, stages - 1)


class Batches:
    """Keys of one epoch's training batches from a step on: one permutation for all ranks, each takes its share."""

    def __init__(
            self, indices: torch.Tensor, batch_size: int, epoch: int, first: int, seed: int, rank: int, ranks: int,
    ):
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        self.order = indices[order].tolist()
        self.batch_size, self.epoch, self.first, self.rank, self.ranks = batch_size, epoch, first, rank, ranks

    def __len__(self) -> int:
        return len(self.order) // self.batch_size - self.first

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        for step in range(self.first, len(self.order) // self.batch_size):
            batch = self.order[step * self.batch_size:(step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch[self.rank::self.ranks]]


def save_atomically(state: Dict[str, Any], path: Path) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def write_log(rows: List[Dict[str, Any]], folder: Path, title: str) -> None:
    """Write log.csv and plot.svg."""
    with open(folder / 'log.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot

    matplotlib.rcParams['svg.hashsalt'] = 'train'
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    epochs = [row['epoch'] for row in rows]
    measured = [row for row in rows if row['accuracy'] != '']
    left.plot(epochs, [row['train_loss'] for row in rows], label='training (augmented, smoothed)')
    left.plot([row['epoch'] for row in measured], [row['val_loss'] for row in measured], label='validation')
    left.set(xlabel='epoch', ylabel='loss')
    left.legend(frameon=False)
    right.plot([row['epoch'] for row in measured], [row['accuracy'] for row in measured], marker='.')
    right.set(xlabel='epoch', ylabel='top-1 accuracy on validation, %')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title)
    figure.savefig(folder / 'plot.svg', metadata={'Date': None})
    pyplot.close(figure)


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
    torch.set_num_threads(args.threads)
    device = init_distributed_device(args)  # sets args.rank, world_size, distributed
    device, rank, ranks, main = torch.device(device), args.rank, args.world_size, args.rank == 0
    if args.batch_size % ranks:
        raise ValueError(
            f'`--batch-size` counts all ranks and must be a multiple of them, got {args.batch_size} for {ranks} ranks.')
    amp = args.amp == 'on' or (args.amp == 'auto' and device.type == 'cuda')
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    train_set, num_classes = open_dataset(args, args.train_split)
    val_set, _ = open_dataset(args, args.val_split)
    num_classes = args.num_classes or num_classes
    if not num_classes:
        raise ValueError('The dataset does not tell its classes. Give `--num-classes`.')

    seed_from('model', args.seed)
    kwargs = dict(args.model_kwargs)
    if args.drop_path:
        kwargs['drop_path_rate'] = args.drop_path
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=num_classes, **kwargs).to(device)
    if args.zero:
        keep_at_zero(model, args.zero)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = create_optimizer_v2(
        model, args.opt, lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None

    data_config = resolve_model_data_config(model)
    common = dict(mean=data_config['mean'], std=data_config['std'], interpolation='bicubic')
    sizes = args.train_sizes or [args.img_size]
    if args.augment == 'batch':
        args_of = dict(seed=args.seed, mean=data_config['mean'], std=data_config['std'])
        samples: Any = BatchSamples(train_set, sizes, args.epochs, is_training=True, **args_of)
        val_samples: Any = BatchSamples(val_set, [args.img_size], 1, is_training=False, **args_of)
    else:
        samples = Samples(train_set, [
            create_transform(
                size, is_training=True, scale=(args.scale, 1.), color_jitter=args.color_jitter,
                auto_augment=args.auto_augment, re_prob=args.random_erasing, re_mode='pixel', **common,
            )
            for size in sizes
        ], args.epochs, args.seed)
        val_samples = Samples(val_set, [
            create_transform(args.img_size, crop_pct=args.crop_pct, crop_mode='center', **common),
        ], 1, args.seed)
    indices = random_subset(len(train_set), args.train_limit)
    same_split = args.val_split == args.train_split  # then other images: those at the other end of the permutation
    val_indices = random_subset(len(val_set), args.val_limit, same_split)
    if same_split and len(indices) + len(val_indices) > len(train_set):
        raise ValueError(
            f'Training and validation need different images, got {len(indices)} and {len(val_indices)} of the '
            f'{len(train_set)} in {args.train_split!r}. Lower `--train-limit` or `--val-limit`, or set `--val-split`.')
    val_keys = [(0, i) for i in val_indices.tolist()[rank::ranks]]
    loader_args: Dict[str, Any] = dict(num_workers=args.workers, pin_memory=device.type == 'cuda')
    if args.augment == 'batch':
        loader_args['collate_fn'] = as_it_is
    val_loader = DataLoader(
        val_samples, sampler=val_keys, batch_size=max(1, args.batch_size // ranks), **loader_args)
    steps = len(indices) // args.batch_size  # per epoch
    if not steps:
        raise ValueError(
            f'One batch needs {args.batch_size} images, the training set has {len(indices)}. Lower `--batch-size`.')
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, step_on_epochs=False, updates_per_epoch=steps)
    mixup = Mixup(
        args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=0.5, label_smoothing=args.smoothing,
        num_classes=num_classes,
    ) if args.mixup or args.cutmix else None

    settings = {k: v for k, v in vars(args).items() if k not in FREE_ARGUMENTS}
    settings.update(num_classes=num_classes, parameters=parameters, train_images=len(indices))
    settings['device'] = device.type
    step, rows, loss_sum, seconds, cpu_seconds = 0, [], 0., 0., 0.
    checkpoint = folder / 'checkpoint.pt'
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        changed = sorted(k for k in settings if state['settings'].get(k) != settings[k])
        if changed:
            raise ValueError(
                f'{checkpoint} comes from a run with other values of {", ".join(changed)}. '
                'Repeat its arguments to go on, or choose another `--output`.')
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        if ema:
            ema.module.load_state_dict(state['ema'])
        step, rows, loss_sum = state['step'], state['rows'], state['loss_sum']
        seconds, cpu_seconds = state['seconds'], state['cpu_seconds']
        if main:
            print(f'Going on from step {step} of {steps * args.epochs}.', flush=True)
    elif main:
        describe_run(folder, settings)
    net = model
    if args.distributed:
        net = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == 'cuda' else None)

    def save() -> None:
        if main:
            save_atomically(dict(
                settings=settings, step=step, rows=rows, loss_sum=float(loss_sum), seconds=elapsed(),
                cpu_seconds=cpu_elapsed(), model=model.state_dict(), optimizer=optimizer.state_dict(),
                ema=ema.module.state_dict() if ema else None,
            ), checkpoint)

    def elapsed() -> float:
        return seconds + time.perf_counter() - started

    def cpu_elapsed() -> float:
        return cpu_seconds + time.process_time() - cpu_started

    started = saved = time.perf_counter()
    cpu_started = time.process_time()
    while step < steps * args.epochs:
        epoch, first = divmod(step, steps)
        batches = Batches(indices, args.batch_size, epoch, first, args.seed, rank, ranks)
        mix = mixup is not None and (args.mixup_off_epoch is None or epoch < args.mixup_off_epoch)
        net.train()
        bar = tqdm(
            DataLoader(samples, batch_sampler=batches, **loader_args), desc=f'epoch {epoch}', initial=first,
            total=steps, disable=None if main else True, leave=False)
        for images, labels in bar:
            scheduler.step_update(step)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            seed_from('step', args.seed, rank, step)
            if mix:
                images, labels = mixup(images, labels)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0. if mix else args.smoothing)
            optimizer.zero_grad()
            loss.backward()
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            step += 1
            if ema:
                ema.update(model, step)
            loss_sum = loss_sum + loss.detach()
            if step % 50 == 0:
                if not math.isfinite(loss.item()):
                    raise RuntimeError(
                        f'The loss is {loss.item()} at step {step}. Lower `--lr`, or switch `--amp` off.')
                bar.set_postfix(loss=f'{loss.item():.3f}')
            due = args.checkpoint_steps and step % args.checkpoint_steps == 0
            if step % steps and (due or time.perf_counter() - saved > 60 * args.checkpoint_minutes):
                save()
                saved = time.perf_counter()
        train_loss = torch.as_tensor(float(loss_sum) / steps, device=device)
        if args.distributed:
            dist.all_reduce(train_loss, dist.ReduceOp.AVG if device.type == 'cuda' else dist.ReduceOp.SUM)
            train_loss = train_loss / (1 if device.type == 'cuda' else ranks)
        row: Dict[str, Any] = dict(
            epoch=epoch + 1, img_size=sizes[stage_of(epoch, args.epochs, len(sizes))],
            lr=f'{optimizer.param_groups[0]["lr"]:.3e}', train_loss=round(train_loss.item(), 4), val_loss='',
            accuracy='',
        )
        if (epoch + 1) % args.eval_epochs == 0 or epoch + 1 == args.epochs:
            val_loss, accuracy = evaluate(ema.module if ema else model, val_loader, device, amp)
            row.update(val_loss=round(val_loss, 4), accuracy=round(accuracy, 2))
        row.update(seconds=round(elapsed(), 1), cpu_seconds=round(cpu_elapsed(), 1))  # of this process
        rows.append(row)
        loss_sum = 0.
        save()
        saved = time.perf_counter()
        if main:
            print(', '.join(f'{k} {v}' for k, v in row.items() if v != ''), flush=True)
            write_log(rows, folder, f'{args.model}, {parameters / 1e6:.2f} M parameters')
    if main and args.summary:
        add_row(Path(args.summary), dict(rows[-1], **settings))
    if main:
        tensors = {k: v.detach().cpu().contiguous() for k, v in (ema.module if ema else model).state_dict().items()}
        safetensors.torch.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    if args.distributed:
        dist.destroy_process_group()
    return rows[-1]


def keep_at_zero(model: torch.nn.Module, part: str) -> None:
    """Set the parameters whose name contains `part` to zero, and train them no more."""
    found = [p for name, p in model.named_parameters() if part in name]
    if not found:
        raise ValueError(f'`--zero` needs a part of the name of a parameter, got {part!r}, which is in none.')
    for p in found:
        torch.nn.init.zeros_(p).requires_grad_(False)


def add_row(path: Path, row: Dict[str, Any]) -> None:
    """Add the columns `SUMMARY` of a row to a CSV file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, SUMMARY, extrasaction='ignore', lineterminator='\n')
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def as_it_is(batch: Any) -> Any:
    """Return a batch that needs no collating."""
    return batch


def random_subset(length: int, limit: Optional[int], last: bool = False) -> torch.Tensor:
    """Return all indices in order, or the first or last `limit` of a permutation that is the same in every run."""
    if limit is None or limit >= length:
        return torch.arange(length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    return (order[length - limit:] if last else order[:limit]).sort().values


def describe_run(folder: Path, settings: Dict[str, Any]) -> None:
    """Write config.json: settings, versions and hardware."""
    cpu = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        cpu = next((line.split(': ')[1] for line in info.read_text().splitlines() if 'model name' in line), cpu)
    hardware = torch.cuda.get_device_name() if settings['device'] == 'cuda' else f'{cpu}, {settings["threads"]} threads'
    record = dict(
        settings=settings, hardware=hardware, torch=torch.__version__, timm=timm.__version__,
        timm_crossformer=timm_crossformer.__version__)
    (folder / 'config.json').write_text(json.dumps(record, indent=1, default=str) + '\n')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run from the command line."""
    train(parse_args(argv))
    return 0


if __name__ == '__main__':
    sys.exit(main())
