"""Train a network that takes a field on the globe to the next step: many channels, a wide grid, a dense result.

    python examples/train_weather.py --output outputs/weather

The field is made: waves that travel around the globe, each channel faster than the one before, and faster at the
equator than at the poles. The grid is circular in longitude and not in latitude, as in weather models. Two minutes on
two cores. Writes weather.png: a state, what changes in a step, and what the network says will change.
"""
import argparse
import math
from pathlib import Path
from typing import Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_crossformer  # noqa: F401  registers the models

CHANNELS, LATITUDES, LONGITUDES = 6, 64, 128
WAVES = 8
SEAM = 32  # columns on each side that are repeated from the other: a patch of the coarsest level


class NextStep(nn.Module):
    """A pyramid, its levels joined from coarse to fine, and a change for every point of the grid."""

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.encoder = timm.create_model(
            'test_crossformer', features_only=True, in_chans=channels, lda_grouping='region')
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in self.encoder.feature_info.channels())
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.lateral)
        patch = self.encoder.feature_info.reduction()[0]
        self.spread = nn.Sequential(nn.GELU(), nn.Conv2d(width, 16 * patch ** 2, 1), nn.PixelShuffle(patch), nn.GELU())
        self.head = nn.Conv2d(16 + channels, channels, 3, padding=1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)  # nothing changes, to begin with

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, channels, latitude, longitude] to the next step; any grid, whose sides need not divide by anything.

        East of the last column lies the first. The network does not know; it sees a strip of it twice, and what it says
        of the strip is cut off. That serves every layer alike, at the price of a wider map.
        """
        _, _, height, width = x.shape
        wide = F.pad(x, (SEAM, SEAM, 0, 0), mode='circular')
        joined = torch.zeros((), device=x.device)
        for level, lateral, smooth in list(zip(self.encoder(wide), self.lateral, self.smooth, strict=True))[::-1]:
            if joined.ndim:
                joined = F.interpolate(joined, size=level.shape[2:], mode='nearest')
            joined = joined + lateral(level)
            joined = joined + smooth(F.gelu(joined))
        fine = self.spread(joined)[:, :, :height, :width + 2 * SEAM]
        return x + self.head(torch.cat([fine, wide], 1))[..., SEAM:SEAM + width]


def make(count: int, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """Make states and the next steps, each [count, CHANNELS, LATITUDES, LONGITUDES]."""
    latitude = torch.linspace(-math.pi / 2, math.pi / 2, LATITUDES)[:, None]
    longitude = torch.arange(LONGITUDES) * (2 * math.pi / LONGITUDES)
    numbers = torch.randint(1, 9, (count, CHANNELS, WAVES, 1, 1), generator=generator)  # crests around the globe
    phases, tilts, sizes = torch.rand(3, count, CHANNELS, WAVES, 1, 1, generator=generator)
    speeds = torch.linspace(.02, .12, CHANNELS)[:, None, None, None] * latitude.cos()

    def at(time: float) -> Tensor:
        angle = numbers * (longitude - time * speeds + tilts * latitude.sin()) + 2 * math.pi * phases
        return (sizes * angle.cos()).sum(2) * latitude.cos()

    return at(0.), at(1.)


def error(a: Tensor, b: Tensor) -> float:
    """Return the root of the mean squared difference."""
    return (a - b).square().mean().sqrt().item()


def main() -> None:
    """Train, compare with persistence, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--output', type=Path, default=Path('outputs/weather'))
    parser.add_argument('--steps', type=int, default=120)
    parser.add_argument('--batch', type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    states, following = make(64, torch.Generator().manual_seed(2))
    model = NextStep(CHANNELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=.1)
    for step in range(args.steps):
        x, y = make(args.batch, generator)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f'step {step}: error {loss.sqrt():.4f}', flush=True)
    model.eval()
    with torch.inference_mode():
        found = model(states)
    seam = torch.cat([torch.arange(8), torch.arange(LONGITUDES - 8, LONGITUDES)])
    print(f'64 states it has not seen: error {error(found, following):.4f}, within 8 columns of the seam '
          f'{error(found[..., seam], following[..., seam]):.4f}; if nothing changed, {error(states, following):.4f}')
    args.output.mkdir(parents=True, exist_ok=True)
    draw(states[0], following[0], found[0], args.output / 'weather.png')
    print(f'Wrote {args.output / "weather.png"}')


def draw(state: Tensor, following: Tensor, found: Tensor, path: Path) -> None:
    """Draw the slowest and the fastest channel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout='constrained')
    axes = figure.subplots(2, 3)
    for line, channel in zip(axes, (0, CHANNELS - 1), strict=True):
        change = following[channel] - state[channel]
        pictures = {
            'state': state[channel], 'what changes in a step': change,
            'what the network says': found[channel] - state[channel]}
        for ax, (title, values) in zip(line, pictures.items(), strict=True):
            top = float((state if title == 'state' else change).abs().max())
            ax.imshow(
                values.numpy(), cmap='RdBu', vmin=-top, vmax=top, extent=(0, 360, -90, 90), aspect='auto')
            ax.set_title(f'channel {channel}: {title}', fontsize=9)
            ax.set(xlabel='longitude', ylabel='latitude')
            ax.label_outer()
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
