"""Train torchvision's Faster R-CNN on blood cells (BCCD), with a CrossFormer and with a peer as backbone.

    pip install pyarrow torchmetrics pycocotools
    python examples/train_detection.py --data DIR --output DIR

DIR has train.parquet and validation.parquet with columns `image` (encoded), `objects.bbox` (x, y, width, height) and
`objects.category` (from 0). Minutes on two cores. Writes results.csv, and predictions.png: truth and predictions.
"""
import argparse
import csv
import io
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pyarrow.parquet
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_convert

import timm_crossformer  # noqa: F401  registers the models

CLASSES = ('background', 'red cell', 'white cell', 'platelets')
COLORS = ('', 'red', 'blue', 'orange')

# Name, backbone, whether it starts from bundled weights, constructor arguments. Parameters are equal within 5 %.
BACKBONES: List[Tuple[str, str, bool, Dict[str, Any]]] = [
    ('CrossFormer, from CIFAR-10', 'test_crossformer', True, {}),
    ('CrossFormer, from scratch', 'test_crossformer', False, {}),
    ('ConvNeXt, from scratch', 'convnext_tiny', False, dict(depths=(2, 2, 4, 2), dims=(32, 48, 80, 128))),
]

Sample = Tuple[Tensor, Dict[str, Tensor]]


class PyramidBackbone(nn.Module):
    """Maps of strides 4 to 32 of a timm model, through a feature pyramid."""

    def __init__(self, body: nn.Module, out_channels: int = 64):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels)
        self.out_channels = out_channels  # torchvision asks for it

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Return the maps by name, finest first."""
        return self.fpn(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))


def detector(backbone: str, pretrained: bool, kwargs: Dict[str, Any]) -> FasterRCNN:
    """Build a small Faster R-CNN; images are halved to 320 x 240."""
    body = timm.create_model(backbone, pretrained=pretrained, features_only=True, **kwargs)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    model = FasterRCNN(
        PyramidBackbone(body), len(CLASSES), min_size=240, max_size=320, rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=300, rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=150, box_batch_size_per_image=128)
    model.roi_heads.box_head.fc6 = nn.Linear(64 * 7 * 7, 256)
    model.roi_heads.box_head.fc7 = nn.Linear(256, 256)
    model.roi_heads.box_predictor.cls_score = nn.Linear(256, len(CLASSES))
    model.roi_heads.box_predictor.bbox_pred = nn.Linear(256, 4 * len(CLASSES))
    return model


def read(path: Path, limit: int) -> List[Sample]:
    """Return images in [0, 1] and targets as torchvision wants them: corners, labels from 1."""
    samples = []
    for row in pyarrow.parquet.read_table(path, columns=['image', 'objects']).slice(0, limit).to_pylist():
        pixels = np.array(Image.open(io.BytesIO(row['image']['bytes'])).convert('RGB'))
        samples.append((torch.from_numpy(pixels).permute(2, 0, 1) / 255, dict(
            boxes=box_convert(torch.tensor(row['objects']['bbox'], dtype=torch.float32), 'xywh', 'xyxy'),
            labels=torch.tensor(row['objects']['category']) + 1,
        )))
    return samples


def mirror(image: Tensor, target: Dict[str, Tensor]) -> Sample:
    """Mirror an image and its boxes, each way half of the time."""
    boxes = target['boxes'].clone()
    for dim, (low, high) in ((1, (1, 3)), (2, (0, 2))):
        if torch.rand(()) < 0.5:
            image = image.flip(dim)
            boxes[:, [low, high]] = image.shape[dim] - boxes[:, [high, low]]
    return image, dict(target, boxes=boxes)


@torch.inference_mode()
def mean_average_precision(model: nn.Module, samples: List[Sample]) -> Tuple[float, float]:
    """Return COCO's mAP, and that at an overlap of 0.5."""
    metric = MeanAveragePrecision()
    for image, target in samples:
        metric.update(model([image]), [target])
    result = metric.compute()
    return float(result['map']), float(result['map_50'])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', required=True)
    parser.add_argument('--output', required=True)
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--limit', type=int, default=10_000, help='images to read of each file')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = (read(Path(args.data) / f'{split}.parquet', args.limit) for split in ('train', 'validation'))
    steps = len(train) // args.batch_size

    rows, models = [], {}
    for name, backbone, pretrained, kwargs in BACKBONES:
        torch.manual_seed(0)
        model = models[name] = detector(backbone, pretrained, kwargs)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.1)
        started, cpu = time.perf_counter(), time.process_time()
        model.train()
        for epoch in range(args.epochs):
            order = torch.randperm(len(train)).tolist()
            total = 0.
            for step in range(steps):
                batch = [mirror(*train[i]) for i in order[step * args.batch_size:(step + 1) * args.batch_size]]
                losses = model([image for image, _ in batch], [target for _, target in batch])
                loss = sum(losses.values())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.)
                optimizer.step()
                schedule.step()
                total += loss.item()
            print(f'{name}: epoch {epoch + 1}, loss {total / steps:.3f}', flush=True)
        model.eval()
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - started
        precision, precision_50 = mean_average_precision(model, validation)
        rows.append({
            'backbone': name,
            'backbone_parameters': sum(p.numel() for p in model.backbone.body.parameters()),
            'data': 'BCCD, validation', 'epochs': args.epochs, 'batch': args.batch_size,
            'mAP': round(precision, 4), 'mAP_50': round(precision_50, 4),
            'cpu_seconds': round(cpu, 1), 'seconds': round(seconds, 1),
        })
        print(rows[-1], flush=True)
        with open(folder / 'results.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
    draw(models, validation[:2], folder / 'predictions.png')
    return 0


def draw(models: Dict[str, nn.Module], samples: List[Sample], path: Path) -> None:
    """Draw true boxes, then each detector's (those it is at least half sure of) over the true ones in white."""
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    size = (4 * (len(models) + 1), 3.2 * len(samples))
    figure, axes = pyplot.subplots(len(samples), len(models) + 1, figsize=size, layout='constrained', squeeze=False)
    for line, (image, target) in zip(axes, samples, strict=True):
        found: List[Tuple[str, Dict[str, Tensor]]] = [('truth', target)]
        with torch.inference_mode():
            found += [(name, model([image])[0]) for name, model in models.items()]
        for axis, (name, boxes) in zip(line, found, strict=True):
            axis.imshow(image.permute(1, 2, 0))
            axis.set_title(name)
            axis.set_axis_off()
            shown = [(box, 'white') for box in target['boxes']] if name != 'truth' else []
            for i, box in enumerate(boxes['boxes']):
                if 'scores' not in boxes or boxes['scores'][i] >= 0.5:
                    shown.append((box, COLORS[int(boxes['labels'][i])]))
            for (left, top, right, bottom), color in ((box.tolist(), color) for box, color in shown):
                axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color))
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    sys.exit(main())
