"""Train a segmentation network of segmentation_models_pytorch on cell nuclei, with a CrossFormer and a peer as encoder.

    pip install segmentation-models-pytorch pyarrow
    python examples/train_segmentation.py --data DIR --output DIR

DIR has train.parquet and validation.parquet with columns `image` and `mask` (encoded images, mask 0 and 1). Minutes on
two cores. Writes results.csv, and predictions.png: image, truth and prediction.
"""
import argparse
import csv
import io
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pyarrow.parquet
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

import timm_crossformer  # noqa: F401  registers the models

# Name, encoder, whether it starts from bundled weights, constructor arguments. Parameters are equal within 5 %.
ENCODERS: List[Tuple[str, str, bool, Dict[str, Any]]] = [
    ('CrossFormer, from CIFAR-10', 'test_crossformer', True, {}),
    ('CrossFormer, from scratch', 'test_crossformer', False, {}),
    ('ConvNeXt, from scratch', 'convnext_tiny', False, dict(depths=(2, 2, 4, 2), dims=(32, 48, 80, 128))),
]


def read(path: Path, limit: int) -> List[Tuple[Tensor, Tensor]]:
    """Return normalised images [3, H, W] and masks [1, H, W]."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None], torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    pairs = []
    for row in pyarrow.parquet.read_table(path, columns=['image', 'mask']).slice(0, limit).to_pylist():
        image, mask = (Image.open(io.BytesIO(row[key]['bytes'])) for key in ('image', 'mask'))
        pixels = torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1) / 255
        pairs.append(((pixels - mean) / std, torch.from_numpy(np.array(mask)).float()[None]))
    return pairs


def crop(pair: Tuple[Tensor, Tensor], top: int, left: int, size: int) -> Tuple[Tensor, Tensor]:
    """Cut a square out of an image and its mask."""
    image, mask = pair
    return image[:, top:top + size, left:left + size], mask[:, top:top + size, left:left + size]


def random_batch(pairs: List[Tuple[Tensor, Tensor]], count: int, size: int) -> Tuple[Tensor, Tensor]:
    """Cut random squares out of random images, turned and mirrored at random."""
    batch = []
    for i in torch.randint(len(pairs), (count,)).tolist():
        _, height, width = pairs[i][0].shape
        top, left = (int(torch.randint(side - size + 1, ())) for side in (height, width))
        turns, mirror = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        batch.append([
            torch.rot90(part.flip(2) if mirror else part, turns, (1, 2)) for part in crop(pairs[i], top, left, size)])
    return torch.stack([image for image, _ in batch]), torch.stack([mask for _, mask in batch])


def centre(pair: Tuple[Tensor, Tensor], size: int = 256) -> Tuple[Tensor, Tensor]:
    """Cut the middle out: every image of the data set has 256 pixels per side."""
    _, height, width = pair[0].shape
    return crop(pair, (height - size) // 2, (width - size) // 2, size)


@torch.inference_mode()
def dice(model: torch.nn.Module, pairs: List[Tuple[Tensor, Tensor]]) -> float:
    """Return the Dice coefficient of all pixels of the middle 256 x 256 of each image."""
    both = total = 0.
    for image, mask in map(centre, pairs):
        predicted = model(image[None])[0] > 0
        both += float((predicted & (mask > 0)).sum())
        total += float(predicted.sum() + mask.sum())
    return 2 * both / total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', required=True)
    parser.add_argument('--output', required=True)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--crop', type=int, default=128)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--limit', type=int, default=10_000, help='images to read of each file')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = (read(Path(args.data) / f'{split}.parquet', args.limit) for split in ('train', 'validation'))

    rows, models = [], {}
    for name, encoder, pretrained, kwargs in ENCODERS:
        torch.manual_seed(0)
        model = models[name] = smp.FPN(
            f'tu-{encoder}', encoder_weights=True if pretrained else None, decoder_pyramid_channels=64,
            decoder_segmentation_channels=32, decoder_dropout=0., **kwargs)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
        losses = [smp.losses.DiceLoss('binary'), torch.nn.BCEWithLogitsLoss()]
        started, cpu = time.perf_counter(), time.process_time()
        model.train()
        for step in range(args.steps):
            images, masks = random_batch(train, args.batch_size, args.crop)
            logits = model(images)
            loss = sum(each(logits, masks) for each in losses)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.)
            optimizer.step()
            schedule.step()
            if (step + 1) % 50 == 0:
                print(f'{name}: step {step + 1}, loss {loss.item():.3f}', flush=True)
        model.eval()
        rows.append({
            'encoder': name,
            'encoder_parameters': sum(p.numel() for p in model.encoder.parameters()),
            'data': 'nuclei, validation, middle 256 x 256', 'steps': args.steps, 'batch': args.batch_size,
            'crop': args.crop, 'dice': round(dice(model, validation), 4),
            'cpu_seconds': round(time.process_time() - cpu, 1), 'seconds': round(time.perf_counter() - started, 1),
        })
        print(rows[-1], flush=True)
        with open(folder / 'results.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
    draw(models, validation[:3], folder / 'predictions.png')
    return 0


def draw(models: Dict[str, torch.nn.Module], pairs: List[Tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw image, truth, and each network's prediction."""
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot

    size = (3 * (len(models) + 1), 3 * len(pairs))
    figure, axes = pyplot.subplots(len(pairs), len(models) + 1, figsize=size, layout='constrained', squeeze=False)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None], torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    for line, (image, mask) in zip(axes, map(centre, pairs), strict=True):
        pixels = (image * std + mean).permute(1, 2, 0).clamp(0, 1)
        line[0].imshow(pixels)
        line[0].contour(mask[0], [0.5], colors='lime', linewidths=1)
        line[0].set_title('truth')
        for axis, (name, model) in zip(line[1:], models.items(), strict=True):
            with torch.inference_mode():
                predicted = (model(image[None])[0, 0] > 0).float()
            axis.imshow(pixels)
            axis.contour(mask[0], [0.5], colors='lime', linewidths=1)
            if 0 < predicted.mean() < 1:
                axis.contour(predicted, [0.5], colors='red', linewidths=1)
            axis.set_title(name)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    sys.exit(main())
