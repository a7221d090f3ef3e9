"""Images of discs (class 1) and squares (class 2) on a noisy ground, made on the fly for the examples beside."""
from typing import Dict, Tuple

import torch
from torch import Tensor


def scene(height: int, width: int, generator: torch.Generator) -> Tuple[Tensor, Dict[str, Tensor]]:
    """Draw one image.

    Returns:
        Image [3, height, width] in [0, 1]; boxes [N, 4] as x0, y0, x1, y1, labels [N] and masks [N, height, width].
    """
    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    image = torch.rand(3, 1, 1, generator=generator) * .4 + torch.rand(3, height, width, generator=generator) * .2
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    boxes, labels, masks = [], [], []
    for _ in range(int(number(1, 4))):
        radius = number(.1, .22) * min(height, width)
        cy, cx = number(radius, height - 1 - radius), number(radius, width - 1 - radius)
        label = 1 + int(number(0, 2))
        dy, dx = (y - cy).abs(), (x - cx).abs()
        mask = dy.square() + dx.square() <= radius ** 2 if label == 1 else torch.maximum(dy, dx) <= radius
        image = torch.where(mask, torch.rand(3, 1, 1, generator=generator) * .4 + .6, image)
        boxes.append([cx - radius, cy - radius, cx + radius, cy + radius])
        labels.append(label)
        masks.append(mask)
    return image, dict(
        boxes=torch.tensor(boxes), labels=torch.tensor(labels), masks=torch.stack(masks).to(torch.uint8))


def class_map(target: Dict[str, Tensor]) -> Tensor:
    """Merge the masks of a scene into one map [height, width] of classes, 0 for the ground."""
    classes = torch.zeros(target['masks'].shape[1:], dtype=torch.long)
    for mask, label in zip(target['masks'], target['labels'], strict=True):
        classes[mask.bool()] = label
    return classes
