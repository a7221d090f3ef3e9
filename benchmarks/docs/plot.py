"""Draw the plots of the READMEs from the CSV files: `python benchmarks/docs/plot.py`, into benchmarks/plots."""
import argparse
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from readme import DEPLOYED, cases, deployment, hardware, read_csv, rows, short, threads_words

PLOTS = Path(__file__).parents[1] / 'plots'
STYLE = {
    'svg.hashsalt': 'crossformer',  # the same file from the same rows
    'svg.fonttype': 'none',
    'font.family': 'sans-serif',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.alpha': .3,
    'legend.frameon': False,
}


def throughput(results: Path) -> Optional[Figure]:
    """Draw images per second at 224 px over multiply-adds, ours and peers, a panel for each processor."""
    measured = rows.read(results, 'infer', '*', '*', size='224', task='logits', mode='eager')
    measured = measured[measured['contestant'].isin([*cases.OURS, *cases.PEERS])]
    panels = []
    for _, panel in measured[::-1].groupby(['hardware', 'dtype'], sort=False):
        panel = rows.latest(rows.pick(panel[::-1], batch=panel['batch'].max(), threads=panel['threads'].max()))
        panels += [panel] if len(panel) > 1 else []
    if not panels:
        return None
    figure = Figure(figsize=(8, 3.5 * len(panels)), layout='constrained')
    left, right = measured['gmacs'].min(), measured['gmacs'].max()
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        panel = panel.assign(rate=1e3 * panel['batch'] / panel['median_ms']).sort_values('rate')
        top = panel['rate'].max() * 1.1
        # Labels stand in a column in the order of their points: they push each other apart until each has its line.
        heights, line = panel['rate'].to_numpy(), top * .065
        for _ in range(1000):
            overlap = np.maximum(0, line - np.diff(heights)) / 4
            heights = heights - np.append(overlap, 0) + np.append(0, overlap)
        for height, (_, row) in zip(heights, panel.iterrows(), strict=True):
            ours = row['contestant'] in cases.OURS
            color = 'C0' if ours else '0.45'
            axes.plot([row['gmacs'], right * 1.04], [row['rate'], height], color=color, linewidth=.5, alpha=.6)
            axes.plot(row['gmacs'], row['rate'], 'o' if ours else 's', color=color)
            axes.text(right * 1.05, height, f'{short(row["contestant"])}  {row["rate"]:.3g}', color=color, fontsize=8,
                      va='center')
        axes.set(xlim=(int(left), right * 1.3), ylim=(0, top), xlabel='GMACs of one image', ylabel='images per second')
        axes.set_xticks(np.arange(int(left), right + .1, .5))
        first = panel.iloc[0]
        case = f'Inference at 224 px, batch {first["batch"]}, {first["dtype"]}, {threads_words(first["threads"])}'
        axes.set_title(f'{case}\n{hardware(panel)}', fontsize=9)
    return figure


def time_per_megapixel(results: Path) -> Optional[Figure]:
    """Draw time per megapixel over image size: crossformer_small with each grouping, and Swin."""
    measured = rows.latest(rows.read(results, 'sizes'))
    measured = rows.pick(measured, threads=measured['threads'].max())
    lines = {f'{cases.SMALL} (map)': cases.SMALL, **{short(name): name for name in cases.LINEAR},
             f'{cases.SMALL} map, fit_groups': f'{cases.SMALL} fit_groups=True', 'swin_tiny': cases.SWIN}
    measured = measured[measured['contestant'].isin(lines.values())]
    if measured.empty:
        return None
    area = measured['megapixels']
    measured = measured.assign(side=1e3 * area ** .5, pace=measured['median_ms'] / area)
    paces = measured.sort_values('side').pivot(index='side', columns='contestant', values='pace')
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for label, name in lines.items():
        if name in paces:
            color = '0.5' if name == cases.SWIN else None
            axes.plot(paces[name].dropna(), marker='o', markersize=4, label=label, color=color)
    ticks = measured.groupby('size')['side'].first().reindex(cases.SIZES).dropna()
    axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, ticks.index, rotation=60)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel='image size, px', ylabel='ms per megapixel')
    case = f'Inference, batch 1, fp32, {threads_words(measured["threads"].max())}'
    axes.set_title(f'{case}\n{hardware(measured)}', fontsize=9)
    axes.legend(fontsize=8)
    return figure


def deployed(results: Path) -> Optional[Figure]:
    """Draw the time of an image at 224 px in each runtime, a panel for each batch."""
    measured = rows.pick(deployment(results), size='224')
    if measured.empty:
        return None
    batches = sorted(measured['batch'].unique())
    figure = Figure(figsize=(8, 3.2 * len(batches)), layout='constrained')
    for batch, axes in zip(batches, figure.subplots(len(batches), squeeze=False)[:, 0], strict=True):
        panel = rows.pick(measured, batch=batch)
        table = (panel.assign(ms=panel['median_ms'] / batch)
                 .pivot(index='name', columns='way', values='ms').reindex(panel['name'].unique()))
        ways = [way for way in DEPLOYED.values() if way in table]
        for i, way in enumerate(ways):
            axes.bar(np.arange(len(table)) + (i - (len(ways) - 1) / 2) * .8 / len(ways), table[way], .8 / len(ways),
                     label=way)
        axes.set_xticks(range(len(table)), table.index, fontsize=8)
        axes.grid(axis='x', visible=False)
        axes.set(ylabel='ms per image')
        axes.set_title(f'224 px, batch {batch}, {threads_words(panel["threads"].max())}\n{hardware(panel)}', fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8)
    return figure


def roofline(results: Path) -> Optional[Figure]:
    """Draw the estimated time of an image by kind of operator, on each card."""
    estimates = read_csv(results / 'roofline.csv')
    if estimates.empty:
        return None
    estimates = rows.pick(estimates, dtype='bf16')
    estimates = estimates[estimates['batch'] != 8]
    cards = [name for name in estimates if name.endswith('_ms_estimate')]
    shapes = list(dict.fromkeys(zip(estimates['size'], estimates['batch'], strict=True)))
    figure = Figure(figsize=(10, 2.1 * len(cards) + .8), layout='constrained')
    grid = figure.subplots(len(cards), len(shapes), squeeze=False, sharey=True)
    for card, line in zip(cards, grid, strict=True):
        for (size, batch), axes in zip(shapes, line, strict=True):
            mine = rows.pick(estimates, size=size, batch=batch)
            table = mine.pivot(index='model', columns='kind', values=card).fillna(0.) / batch
            table = table.loc[mine['model'].unique(), estimates['kind'].unique()][::-1]
            left = np.zeros(len(table))
            for kind in table:
                axes.barh([short(name) for name in table.index], table[kind], left=left, label=kind)
                left += table[kind].to_numpy()
            axes.grid(axis='y', visible=False)
            axes.set_title(f'{card.partition("_")[0]}, {size} px, batch {batch}', fontsize=9)
            axes.set_xlabel('estimated ms per image', fontsize=8)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=7, fontsize=8)
    figure.suptitle('Estimate, nothing here was measured: inference in bf16, eager', fontsize=10)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Date': None})
    text = path.read_text(encoding='utf-8')
    path.write_text('\n'.join(line.rstrip() for line in text.splitlines()) + '\n', encoding='utf-8')


PLOTTERS = {
    'throughput': throughput, 'time_per_megapixel': time_per_megapixel, 'deployed': deployed, 'roofline': roofline}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--results', type=Path, default=rows.RESULTS, help='folder of the CSV files')
    parser.add_argument('--plots', type=Path, default=PLOTS, help='folder of the plots')
    args = parser.parse_args(argv)
    missing: List[str] = []
    with matplotlib.rc_context(STYLE):
        for name, draw in PLOTTERS.items():
            figure = draw(args.results)
            if figure is None:
                missing.append(name)
            else:
                _save(figure, args.plots / f'{name}.svg')
                print(args.plots / f'{name}.svg')
    if missing:
        print(
            f'Nothing measured for {", ".join(missing)}: run `python benchmarks/speed/bench.py all`.', file=sys.stderr)
    return 1 if missing else 0


if __name__ == '__main__':
    sys.exit(main())
