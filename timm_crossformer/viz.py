"""Draw what the levels of the feature pyramid see, and where attention goes.

Needs matplotlib: `pip install timm_crossformer[viz]`.
"""
import math
from pathlib import Path
from typing import Any, List, Sequence, Union

import torch
from torch import Tensor

from .explain import token_at


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
    columns = 1 + max(len(levels) for levels in pyramids)
    figure = _figure(path, 2.4 * columns, 2.7 * len(images))
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
    _save(figure, path)


def draw_attention(
        image: Tensor,
        maps: Sequence[Sequence[Tensor]],
        at: Sequence[float],
        path: Union[str, Path],
) -> None:
    """Draw where the token of a point attends, stages as columns, short and long distance as rows, and save it.

    Every weight is a mean over the heads and the blocks of its kind. The tokens attended to are coloured by their
    weight; the photo is dimmed elsewhere. A white frame marks the token that asks.

    Args:
        image: Image [3 or 1, H, W] in 0..1.
        maps: What `explain.attention_from` returns for it.
        at: The point (x, y), from 0 to 1.
        path: PNG, PDF or any other format matplotlib writes, by the suffix.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The path has no suffix.
    """
    height, width = image.shape[1:]
    figure = _figure(path, 2.6 * len(maps), 2 * (2.5 * height / width + .4) + .7)
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle

    axes = figure.subplots(2, len(maps), squeeze=False)
    photo = image.mean(dim=0, keepdim=True).expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).cpu()
    colors = ScalarMappable(cmap='plasma')
    colors.set_clim(0, 1)
    for stage, blocks in enumerate(maps):
        for kind, axis in enumerate(axes[:, stage]):
            axis.set_axis_off()
            own = blocks[kind::2]
            name = f'stage {stage + 1}, {("short", "long")[kind]}'
            if not own:
                axis.set_title(f'{name}: no block', fontsize=9)
                continue
            weights = torch.stack([heads.mean(dim=0) for heads in own]).mean(dim=0).cpu()
            side = 4 * 2 ** stage  # pixels of a token
            h, w = weights.shape
            cover = colors.to_rgba((weights / weights.max()).numpy(), alpha=.75)
            cover[(weights == 0).numpy()] = 0, 0, 0, .55
            axis.imshow(photo.numpy(), extent=(0, width, height, 0))
            axis.imshow(cover, extent=(0, w * side, h * side, 0), interpolation='nearest')
            row, col = token_at(at, height, width, stage)
            for color, line in (('black', 3), ('white', 1.5)):
                axis.add_patch(Rectangle(
                    (col * side, row * side), side, side, fill=False, color=color, linewidth=line))
            axis.set_xlim(0, width)
            axis.set_ylim(height, 0)
            axis.set_title(f'{name}: {int((weights > 0).sum())} of {h} × {w} tokens', fontsize=9)
    bar = figure.colorbar(colors, ax=axes, location='bottom', shrink=.6, aspect=40, pad=.02)
    bar.set_label('attention weight, relative to the largest of the map; white frame: the token that asks', fontsize=9)
    _save(figure, path)


def _figure(path: Union[str, Path], width: float, height: float) -> Any:
    """Start a figure of some inches, if it can be drawn and saved."""
    if not Path(path).suffix:
        raise ValueError(f'A picture needs a name with a suffix, such as pyramid.png; got {path}.')
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('Drawing needs matplotlib. Run `pip install timm_crossformer[viz]`.') from e
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Union[str, Path]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches='tight')
