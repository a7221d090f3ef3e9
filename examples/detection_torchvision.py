"""Detect generated shapes with Faster R-CNN, RetinaNet or Mask R-CNN of torchvision on a CrossFormer pyramid.

    pip install timm_crossformer torchvision matplotlib
    python examples/detection_torchvision.py                              # Faster R-CNN
    python examples/detection_torchvision.py --detector MaskRCNN

`Backbone` is all that torchvision needs; `size_divisible=1` keeps images at their odd sizes. Trains from scratch,
prints the share of shapes found, and writes detection_torchvision.png.
"""
import argparse
from collections import OrderedDict

import matplotlib
import timm
import torch
from shapes import scene
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import timm_crossformer  # noqa: F401  registers the models

matplotlib.use('Agg')
import matplotlib.pyplot as plt


class Backbone(nn.Module):
    """A CrossFormer and an FPN: maps of strides 4, 8, 16, 32 and 64."""

    def __init__(self, name, channels=64, **kwargs):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x):
        """Return the maps by name."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(x))))


def build(detector, backbone):
    anchors = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128)), ((.5, 1., 2.),) * 5)
    args = dict(num_classes=3, min_size=63, max_size=101, size_divisible=1)
    if detector == 'RetinaNet':
        return RetinaNet(backbone, anchor_generator=anchors, **args)
    maps = ['0', '1', '2', '3']
    args.update(rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(maps, 7, 2))
    if detector == 'MaskRCNN':
        return MaskRCNN(backbone, mask_roi_pool=MultiScaleRoIAlign(maps, 14, 2), **args)
    return FasterRCNN(backbone, **args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='test_crossformer', help='any CrossFormer')
    parser.add_argument('--detector', default='FasterRCNN', choices=['FasterRCNN', 'RetinaNet', 'MaskRCNN'])
    parser.add_argument('--steps', type=int, help='60, 40 of Mask R-CNN, or 200 of RetinaNet, which starts slowly')
    parser.add_argument('--output', default='detection_torchvision.png')
    args = parser.parse_args()
    steps = args.steps or {'MaskRCNN': 40, 'RetinaNet': 200}.get(args.detector, 60)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sizes = [(63, 97), (71, 75), (67, 90), (64, 96)]

    model = build(args.detector, Backbone(args.backbone))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=.2)
    for step in range(steps):
        images, targets = zip(*[scene(*size, generator) for size in sizes], strict=True)
        losses = model(list(images), [dict(target) for target in targets])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f'step {step:3d}  ' + '  '.join(f'{k} {v.item():.3f}' for k, v in losses.items()), flush=True)

    model.eval()
    images, targets = zip(*[scene(*sizes[i % 4], generator) for i in range(24)], strict=True)
    with torch.no_grad():
        found = model(list(images))
    hits = total = 0
    for out, target in zip(found, targets, strict=True):
        out['keep'] = out['scores'] > .3
        overlap = box_iou(target['boxes'], out['boxes'][out['keep']])
        same = target['labels'][:, None] == out['labels'][out['keep']][None]
        hits += ((overlap > .5) & same).any(1).sum().item()
        total += len(target['boxes'])
    print(f'{args.detector}: found {hits} of {total} shapes, with the right class and IoU > 0.5')

    _, axes = plt.subplots(2, 4, figsize=(10, 5))
    for axis, image, out in zip(axes.flat, images, found, strict=False):
        axis.imshow(image.permute(1, 2, 0))
        for (x0, y0, x1, y1), label in zip(
                out['boxes'][out['keep']].tolist(), out['labels'][out['keep']].tolist(), strict=True):
            axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=('red', 'cyan')[label - 1]))
        axis.axis('off')
    plt.tight_layout()
    plt.savefig(args.output, dpi=100)
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
