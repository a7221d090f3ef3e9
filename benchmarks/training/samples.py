"""Images to train on and to validate with: which, in which order, and how they are changed, all from seeds."""
import argparse
import hashlib
import io
import random
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset


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


def as_it_is(batch: Any) -> Any:
    """Return a batch that needs no collating."""
    return batch


def random_subset(length: int, limit: Optional[int], last: bool = False) -> torch.Tensor:
    """Return all indices in order, or the first or last `limit` of a permutation that is the same in every run."""
    if limit is None or limit >= length:
        return torch.arange(length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    return (order[length - limit:] if last else order[:limit]).sort().values


class Images:
    """The training and validation images of a run, and the loaders of this rank."""

    def __init__(self, args: argparse.Namespace):
        """
        Args:
            args: Of the command line, and `rank` and `world_size`.

        Raises:
            ValueError: The number of classes is unknown, there is no whole batch, or both sets would share images.
        """
        self.args = args
        self.train_set, classes = open_dataset(args, args.train_split)
        self.val_set, _ = open_dataset(args, args.val_split)
        self.num_classes = args.num_classes or classes
        if not self.num_classes:
            raise ValueError('The dataset does not tell its classes. Give `--num-classes`.')
        self.sizes = args.train_sizes or [args.img_size]
        self.indices = random_subset(len(self.train_set), args.train_limit)
        same_split = args.val_split == args.train_split  # then other images: those at the other end of the permutation
        self.val_indices = random_subset(len(self.val_set), args.val_limit, same_split)
        if same_split and len(self.indices) + len(self.val_indices) > len(self.train_set):
            raise ValueError(
                f'Training and validation need different images, got {len(self.indices)} and {len(self.val_indices)} '
                f'of the {len(self.train_set)} in {args.train_split!r}. Lower `--train-limit` or `--val-limit`, or set '
                '`--val-split`.')
        self.steps = len(self.indices) // args.batch_size  # per epoch
        if not self.steps:
            raise ValueError(
                f'One batch needs {args.batch_size} images, the training set has {len(self.indices)}. Lower '
                '`--batch-size`.')

    def transform(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Choose how images become tensors, given the mean and standard deviation of the model's inputs."""
        args = self.args
        if args.augment == 'batch':
            common: Dict[str, Any] = dict(seed=args.seed, mean=mean, std=std)
            self.samples: Dataset = BatchSamples(
                self.train_set, self.sizes, args.epochs, is_training=True, **common)
            self.val_samples: Dataset = BatchSamples(self.val_set, [args.img_size], 1, is_training=False, **common)
            return
        common = dict(mean=mean, std=std, interpolation='bicubic')
        self.samples = Samples(self.train_set, [
            create_transform(
                size, is_training=True, scale=(args.scale, 1.), color_jitter=args.color_jitter,
                auto_augment=args.auto_augment, re_prob=args.random_erasing, re_mode='pixel', **common,
            )
            for size in self.sizes
        ], args.epochs, args.seed)
        self.val_samples = Samples(self.val_set, [
            create_transform(args.img_size, crop_pct=args.crop_pct, crop_mode='center', **common),
        ], 1, args.seed)

    def train_loader(self, epoch: int, first: int) -> DataLoader:
        """Load the batches of an epoch from a step on."""
        args = self.args
        batches = Batches(self.indices, args.batch_size, epoch, first, args.seed, args.rank, args.world_size)
        return self._loader(self.samples, batch_sampler=batches)

    def val_loader(self) -> DataLoader:
        """Load this rank's share of the validation images."""
        args = self.args
        keys = [(0, i) for i in self.val_indices.tolist()[args.rank::args.world_size]]
        return self._loader(self.val_samples, sampler=keys, batch_size=max(1, args.batch_size // args.world_size))

    def _loader(self, samples: Dataset, **kwargs: Any) -> DataLoader:
        if self.args.augment == 'batch':
            kwargs['collate_fn'] = as_it_is
        pin = torch.device(self.args.device).type == 'cuda'
        return DataLoader(samples, num_workers=self.args.workers, pin_memory=pin, **kwargs)
