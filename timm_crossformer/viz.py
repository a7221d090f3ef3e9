"""Draw what the levels of the feature pyramid see. Needs matplotlib: `pip install timm_crossformer[viz]`."""
import math
from pathlib import Path
from typing import List, Sequence, Union

import torch
from torch import Tensor


def principal_colors(level: Tensor) -> Tensor:
    """Colour a feature map [C, H, W] by its three strongest directions, as red, green and blue [H, W, 3] in 0..1."""
    tokens = level.flatten(1).T.double()  # H * W, C
    tokens = tokens - tokens.mean(dim=0)
    rank = min(3, *tokens.shape)
    directions = torch.linalg.eigh(tokens.T @ tokens)[1].flip(1)[:, :rank]
    directions = directions * torch.where(directions.sum(dim=0) < 0, -1., 1.)  # a sign that does not depend on the CPU
    colors = torch.nn.functional.pad(tokens @ directions, (0, 3 - rank))
    low, high = colors.quantile(0.01, dim=0), colors.quantile(0.99, dim=0)
    colors = ((colors - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.reshape(*level.shape[1:], 3).float()


def draw_pyramids(
        images: Sequence[Tensor],
        pyramids: Sequence[Sequence[Tensor]],
        path: Union[str, Path],
        titles: Sequence[str] = (),
) -> None:
    """Draw one row per image, the image beside its levels, and save it.

    Args:
        images: Images [3 or 1, H, W] in 0..1.
        pyramids: Levels [C, H, W] of every image.
        path: PNG, PDF or any other format matplotlib writes, by the suffix.
        titles: Name of every image.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The path has no suffix.
    """
    if not Path(path).suffix:
        raise ValueError(f'A picture needs a name with a suffix, such as pyramid.png; got {path}.')
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('Drawing needs matplotlib. Run `pip install timm_crossformer[viz]`.') from e
    columns = 1 + max(len(levels) for levels in pyramids)
    figure = Figure(figsize=(2.4 * columns, 2.7 * len(images)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, (image, levels) in enumerate(zip(images, pyramids, strict=True)):
        pictures: List[Tensor] = [image.permute(1, 2, 0).expand(-1, -1, 3), *map(principal_colors, levels)]
        captions = [titles[row] if titles else 'image'] + [
            f'1/{2 ** round(math.log2(image.shape[1] / level.shape[1]))}: ' + ' × '.join(map(str, level.shape))
            for level in levels
        ]
        for axis, picture, caption in zip(axes[row], pictures, captions, strict=False):
            axis.imshow(picture.clamp(0, 1).cpu().numpy(), interpolation='nearest')
            axis.set_title(caption, fontsize=9)
        for axis in axes[row]:
            axis.set_axis_off()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches='tight')
