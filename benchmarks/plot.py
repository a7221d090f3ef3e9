"""Draw the plots of the READMEs from the CSV files: `python benchmarks/plot.py`, into benchmarks/plots."""
import argparse
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import matplotlib
from bench import OURS, PEERS, RESULTS, SIZES, SWIN, Results, Row, megapixels
from matplotlib.figure import Figure
from readme import by_threads, hardware, short, threads_words

PLOTS = Path(__file__).parent / 'plots'
STYLE = {
    'svg.hashsalt': 'crossformer',  # the same file from the same rows
    'svg.fonttype': 'none',
    'font.family': 'sans-serif',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.alpha': .3,
}


def time_over_size(rows: Results, path: Path) -> bool:
    """Draw time per megapixel over image size: crossformer_small with each grouping, and Swin."""
    measured = rows.select('sizes')
    threads = max(by_threads(measured), default=1)
    lines = {
        'crossformer_small (map)': 'crossformer_small',
        'crossformer_small region': 'crossformer_small lda_grouping=region',
        'crossformer_small grid': 'crossformer_small lda_grouping=grid',
        'crossformer_small map, fit_groups': 'crossformer_small fit_groups=True',
        'swin_tiny': SWIN,
    }
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    ticks = set()
    for label, name in lines.items():
        mine = [row for row in measured if row['contestant'] == name and int(row['threads']) == threads]
        mine.sort(key=lambda row: megapixels(row) / int(row['batch']))
        if mine:
            ticks |= {row['size'] for row in mine}
            axes.plot(
                [_side(row) for row in mine], [float(row['median_ms']) / megapixels(row) for row in mine],
                marker='o', markersize=4, label=label, color='0.5' if name == SWIN else None,
            )
    if ticks:
        shown = [size for size in SIZES if size in ticks]
        axes.set_xscale('log', base=2)
        axes.set_xticks([_side({'size': size, 'batch': 1}) for size in shown], shown, rotation=60)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel('image size, px')
        axes.set_ylabel('ms per megapixel')
        axes.set_title(f'Inference, batch 1, fp32, {threads_words(threads)}\n{hardware(measured)}', fontsize=9)
        axes.legend(fontsize=8)
        _save(figure, path)
    return bool(ticks)


def throughput(rows: Results, path: Path) -> bool:
    """Draw multiply-adds per second at 224 px against the peers."""
    measured = rows.select('infer', size='224', task='logits', mode='eager', batch=8)
    threads = max(by_threads(measured), default=1)
    mine = [row for row in measured if int(row['threads']) == threads and row['contestant'] in (*OURS, *PEERS)]
    mine.sort(key=lambda row: float(row['gemm_share']))
    if mine:
        figure = Figure(figsize=(7, 4), layout='constrained')
        axes = figure.subplots()
        colors = ['C0' if row['contestant'] in OURS else '0.65' for row in mine]
        bars = axes.barh([short(row['contestant']) for row in mine], [100 * float(row['gemm_share']) for row in mine],
                         color=colors)
        axes.bar_label(bars, [f'{1e3 * int(row["batch"]) / float(row["median_ms"]):.1f} img/s, '
                              f'{float(row["gmacs"]):.1f} GMACs' for row in mine], padding=3, fontsize=8)
        axes.margins(x=.4)
        axes.grid(axis='y', visible=False)
        axes.set_xlabel('share of the matrix rate of the machine, %')
        axes.set_title(f'Inference at 224 px, batch 8, fp32, {threads_words(threads)}\n{hardware(mine)}', fontsize=9)
        _save(figure, path)
        return bool(mine)


def _side(row: Row) -> float:
    """Return the side of the square with as many pixels."""
    return (1e6 * megapixels(row) / int(row['batch'])) ** .5


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Date': None})
    text = path.read_text(encoding='utf-8')
    path.write_text('\n'.join(line.rstrip() for line in text.splitlines()) + '\n', encoding='utf-8')


PLOTTERS = {'time_per_megapixel': time_over_size, 'throughput': throughput}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the CSV files')
    parser.add_argument('--plots', type=Path, default=PLOTS, help='folder of the plots')
    args = parser.parse_args(argv)
    missing: List[str] = []
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTTERS.items():
            path = args.plots / f'{name}.svg'
            if plot(Results(args.results), path):
                print(path)
            else:
                missing.append(name)
    if missing:
        print(f'Nothing measured for {", ".join(missing)}: run `python benchmarks/bench.py all`.', file=sys.stderr)
    return 1 if missing else 0


if __name__ == '__main__':
    sys.exit(main())
