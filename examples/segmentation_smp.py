"""Segment generated images with a decoder of segmentation_models_pytorch on a CrossFormer, odd sizes included.

    pip install timm_crossformer segmentation-models-pytorch matplotlib
    python examples/segmentation_smp.py                                   # Unet on the small test model
    python examples/segmentation_smp.py --encoder crossformer_tiny --decoder FPN

Trains from scratch at 64 x 96, then evaluates at 71 x 101 if the decoder takes odd sizes (Unet does). Prints the mean
IoU and writes segmentation_smp.png: image, truth, prediction.
"""
import argparse

import matplotlib
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from shapes import class_map, scene

import timm_crossformer  # noqa: F401  registers the models

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def batch(count, height, width, generator):
    scenes = [scene(height, width, generator) for _ in range(count)]
    return torch.stack([image for image, _ in scenes]) * 2 - 1, torch.stack([class_map(t) for _, t in scenes])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--encoder', default='test_crossformer', help='any CrossFormer')
    parser.add_argument('--decoder', default='Unet', help='Unet, UnetPlusPlus, MAnet, FPN, UPerNet, Segformer, ...')
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--output', default='segmentation_smp.png')
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = getattr(smp, args.decoder)(encoder_name=f'tu-{args.encoder}', encoder_weights=None, classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=.2)
    for step in range(args.steps):
        images, classes = batch(8, 64, 96, generator)
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f'step {step:3d}  loss {loss.item():.3f}', flush=True)

    model.eval()
    size = (64, 96) if model.requires_divisible_input_shape else (71, 101)
    images, classes = batch(32, *size, generator)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    ious = [((predicted == c) & (classes == c)).sum() / ((predicted == c) | (classes == c)).sum() for c in range(3)]
    print(f'{size[0]} x {size[1]}: mean IoU {torch.stack(ious).mean():.3f}'
          f' (ground {ious[0]:.3f}, discs {ious[1]:.3f}, squares {ious[2]:.3f})')

    _, axes = plt.subplots(3, 4, figsize=(8, 5))
    for i, column in enumerate(axes.T):
        column[0].imshow((images[i] + 1).permute(1, 2, 0) / 2)
        column[1].imshow(classes[i], vmin=0, vmax=2)
        column[2].imshow(predicted[i], vmin=0, vmax=2)
    for axis in axes.flat:
        axis.axis('off')
    plt.tight_layout()
    plt.savefig(args.output, dpi=100)
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
