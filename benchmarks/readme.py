"""Fill the tables of the READMEs from result files, so that no number is typed by hand.

    python benchmarks/readme.py            write
    python benchmarks/readme.py --check    exit with 1 if a file differs from what would be written

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. NAME is one of `TABLES`; words after it are
arguments, as in `<!-- table: csv_file train/peers.csv model accuracy -->`.
"""
import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import versions as ci
from bench import (
    BIRDER,
    LDA_GROUPINGS,
    OURS,
    PEERS,
    RESULTS,
    SIZES,
    SMALL_TRAINED,
    SWIN,
    VIT_PYTORCH,
    Results,
    Row,
    megapixels,
    size_contestants,
    targets_table,
)

ROOT = Path(__file__).parents[1]
FILES = [ROOT / 'README.md', ROOT / 'benchmarks' / 'README.md']
BLOCK = re.compile(r'(<!-- table: (?P<name>[^\n]*?) -->\n).*?(<!-- /table -->)', re.DOTALL)

TABLES: Dict[str, Callable[..., str]] = {}


def table(make: Callable[..., str]) -> Callable[..., str]:
    """Register a table under the function's name."""
    TABLES[make.__name__] = make
    return make


def markdown(head: Sequence[str], body: Sequence[Sequence[Any]], command: str = '') -> str:
    """Write a table; columns in which every cell is empty are left out.

    Args:
        head: Names of the columns.
        body: Cells by row.
        command: What to run where there are no rows.
    """
    if not body:
        return f'Not measured yet: `{command}`.\n'
    keep = [i for i in range(len(head)) if any(str(line[i]) for line in body)]
    numbers = [all(re.fullmatch(r'[-+≥≤×%.,\d ]*', str(line[i])) for line in body) for i in range(len(head))]
    lines = [
        [head[i] for i in keep],
        ['---:' if numbers[i] else '---' for i in keep],
        *([str(line[i]) for i in keep] for line in body),
    ]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def hardware(rows: Sequence[Row]) -> str:
    """Say where rows were measured: once, for the heading of a column."""
    return '; '.join(dict.fromkeys(f'{row["hardware"]}, torch {row["torch"]}' for row in rows))


def by_threads(rows: Sequence[Row]) -> List[int]:
    """List the numbers of threads in rows."""
    return sorted({int(row['threads']) for row in rows})


def threads_words(threads: int) -> str:
    """Write a number of threads."""
    return f'{threads} thread{"s" if threads > 1 else ""}'


def short(contestant: str) -> str:
    """Name a contestant as a table does."""
    names = {BIRDER: 'birder crossformer_s', VIT_PYTORCH: 'vit-pytorch CrossFormer'}
    name, _, options = names.get(contestant, contestant).partition(' lda_grouping=')
    return f'{name} {options}'.replace('fit_groups=True', 'fit_groups').strip()


# ---- tables


@table
def variants(results: Path, root: Path = ROOT) -> str:
    """Variants: parameters and multiply-adds counted, accuracy as its origin states it."""
    manifest = root / 'weights' / 'manifest.json'
    records = json.loads(manifest.read_text(encoding='utf-8'))['weights'] if manifest.exists() else []
    body = []
    # Those with published weights first, CrossFormer before CrossFormer++, then by size.
    published = {record['tag'].partition('.')[0] for record in records if record['metrics']}
    order = sorted(_read(results / 'variants.csv'), key=lambda row: (
        row['variant'] not in published, '_pp_' in row['variant'], float(row['gmacs'])))
    for row in order:
        mine = [record for record in records if record['tag'].partition('.')[0] == row['variant']]
        stated = [record for record in mine if record['metrics'] and not record.get('dense')]
        body.append([
            f'`{row["variant"]}`', f'{float(row["params_m"]):.1f}', f'{float(row["gmacs"]):.2f}', row['size'],
            '; '.join(_accuracy(metric) for record in stated for metric in record['metrics']),
            '; '.join(dict.fromkeys(record['license'] or 'not stated' for record in stated)),
        ])
    head = ['variant', 'params (M)', 'GMACs', 'at px', 'top-1 on ImageNet-1k (source)', 'licence of weights']
    return markdown(head, body, 'python benchmarks/bench.py variants')


@table
def weights(results: Path, root: Path = ROOT) -> str:
    """Weights by name: metric, hosts and licence, from the manifest."""
    words = {'drive': 'Google Drive', 'hub': 'Hugging Face Hub', 'package': 'this package', 'browser': 'Baidu'}
    body = []
    for record in json.loads((root / 'weights' / 'manifest.json').read_text(encoding='utf-8'))['weights']:
        kinds = [source['kind'] for source in record['sources']]
        hosts = [words.get(kind, kind) + ' by hand' * (kind == 'browser') for kind in kinds]
        metrics = {}
        for metric in record['metrics']:
            metrics.setdefault(metric['source'], []).append(f'{metric["value"]} {metric["name"]}')
        data = dict.fromkeys(metric['dataset'] for metric in record['metrics'])
        body.append([
            f'`{record["tag"]}`',
            '; '.join(f'{", ".join(values)} ({source})' for source, values in metrics.items()),
            '; '.join(data),
            ', '.join(hosts),
            record['license'],
        ])
    return markdown(['weights', 'metric (source)', 'on', 'hosts', 'licence'], body)


def _accuracy(metric: Row) -> str:
    """Write a metric of the manifest; only what is not in the heading is named."""
    what = '' if metric['name'] == 'top-1' else f'{metric["name"]} '
    data = '' if metric['dataset'].startswith('ImageNet-1k') else f'on {metric["dataset"]} '
    return f'{metric["value"]} {what}{data}({metric["source"]})'


@table
def speed(results: Path) -> str:
    """Inference at 224 px: images per second and share of the matrix rate, by threads and batch."""
    rows = Results(results)
    measured = rows.select('infer', size='224', task='logits', mode='eager')
    cases = sorted({(int(row['threads']), int(row['batch'])) for row in measured})
    found = {(row['contestant'], int(row['threads']), int(row['batch'])): row for row in measured}
    body = []
    for name in [name for name in (*OURS, *PEERS) if name in {row['contestant'] for row in measured}]:
        mine = [found.get((name, *case)) for case in cases]
        first = next(row for row in mine if row)
        body.append([
            short(name), f'{float(first["params_m"]):.1f}', f'{float(first["gmacs"]):.2f}',
            *(f'{1e3 * int(row["batch"]) / float(row["median_ms"]):.1f}' if row else '' for row in mine),
            *(f'{float(row["gemm_share"]):.0%}' if row else '' for row in mine[-1:]),
        ])
    head = ['224 px, fp32', 'params (M)', 'GMACs']
    head += [f'img/s, {threads_words(threads)}, batch {batch}' for threads, batch in cases]
    head += [f'of matrix rate, {threads_words(cases[-1][0])}, batch {cases[-1][1]}'] if cases else []
    head[0] += f' ({hardware(measured)})'
    return markdown(head, body, 'python benchmarks/bench.py infer')


@table
def ratios(results: Path) -> str:
    """How much faster our models are than the peers of the same network, on each processor that was at hand."""
    cases = [
        ('infer', ours, ours, peer, batch, f'inference, batch {batch}')
        for ours, peer in (('crossformer_small', BIRDER), ('crossformer_lucidrains', VIT_PYTORCH)) for batch in (1, 8)
    ] + [
        ('train', name, ours, peer, 8, 'training step, batch 8') for name, ours, peer in (
            ('crossformer_small', SMALL_TRAINED, BIRDER),
            ('crossformer_lucidrains', 'crossformer_lucidrains', VIT_PYTORCH))
    ]
    everything = Results(results)
    threads = by_threads(everything.select('infer', task='logits', size='224'))
    body = []
    for machine in dict.fromkeys([*everything.machines('infer'), *everything.machines('train')]):
        rows = Results(results, hardware=machine)
        for what, name, ours, peer, batch, words in cases:
            case = {'task': 'train' if what == 'train' else 'logits', 'size': '224', 'batch': batch}
            cells = [rows.ratio(what, {**case, 'contestant': peer, 'threads': n},
                                {**case, 'contestant': ours, 'threads': n}) for n in threads]
            if any(cells):
                body.append([name, short(peer), words, *_times(cells), machine])
    head = ['the same network', 'against', 'at 224 px', *(f'faster, {threads_words(n)}' for n in threads), 'on']
    return markdown(head, body, 'python benchmarks/bench.py infer')


@table
def per_mac(results: Path) -> str:
    """Time per multiply-add over that of swin_tiny."""
    rows = Results(results)
    measured = rows.select('infer', mode='eager')
    cases = sorted({(int(row['threads']), row['task'], row['size'], int(row['batch'])) for row in measured
                    if row['contestant'] == SWIN}, key=str)
    body = []
    for name in [name for name in (*OURS, *PEERS) if name != SWIN]:
        cells = []
        for threads, task, size, batch in cases:
            case = {'threads': threads, 'task': task, 'size': size, 'batch': batch}
            cells.append(rows.ratio('infer', {**case, 'contestant': name}, {**case, 'contestant': SWIN}, 'mac'))
        if any(cells):
            body.append([short(name), *(f'{cell:.2f}' if cell else '' for cell in cells)])
    head = ['time per MAC over that of swin_tiny',
            *(f'{size} px, batch {batch}, {threads_words(threads)}' for threads, _, size, batch in cases)]
    return markdown(head, body, 'python benchmarks/bench.py infer')


@table
def sizes(results: Path, fit: str = '') -> str:
    """Time per megapixel by image size, and time per multiply-add over that at 224; `fit` for fit_groups."""
    rows = Results(results)
    measured = rows.select('sizes')
    threads = max(by_threads(measured), default=1)
    names = [*size_contestants(bool(fit)), *([] if fit else [SWIN])]
    names = [name for name in names if any(row['contestant'] == name for row in measured)]
    columns = [size for size in SIZES if any(row['size'] == size for row in measured)]
    found = {(row['contestant'], row['size']): row for row in measured if int(row['threads']) == threads}
    body = []
    for name in names:
        line = [_with_grouping(name)]
        for size in columns:
            row = found.get((name, size))
            base = {'contestant': name, 'size': '224', 'threads': threads}
            relative = rows.ratio('sizes', {**base, 'size': size}, base, 'mac') if row else None
            pace = f'{float(row["median_ms"]) / megapixels(row):.0f}' if row else ''
            line.append(f'{pace} ({relative:.2f})' if relative and size != '224' else pace)
        if any(line[1:]):
            body.append(line)
    head = [f'ms per megapixel, batch 1, fp32, {threads_words(threads)} ({hardware(measured)})', *columns]
    return markdown(head, body, 'python benchmarks/bench.py sizes')


@table
def size_memory(results: Path) -> str:
    """Peak memory per megapixel by image size."""
    rows = Results(results)
    measured = [row for row in rows.select('sizes') if row['peak_mib']]
    threads = max(by_threads(measured), default=1)
    measured = [row for row in measured if int(row['threads']) == threads]
    columns = [size for size in SIZES if any(row['size'] == size for row in measured)]
    body = []
    for name in [*size_contestants(False), SWIN]:
        cells = {row['size']: f'{float(row["peak_mib"]) / megapixels(row):.0f}' for row in measured
                 if row['contestant'] == name}
        if cells:
            body.append([_with_grouping(name), *(cells.get(size, '') for size in columns)])
    head = [f'peak MiB per megapixel, batch 1, fp32, {threads_words(threads)} ({hardware(measured)})', *columns]
    return markdown(head, body, 'python benchmarks/bench.py sizes')


@table
def memory(results: Path) -> str:
    """Peak memory of inference by image size, beyond weights and input."""
    measured = Results(results).select('memory')
    columns = [size for size in SIZES if any(row['size'] == size for row in measured)]
    found = {(row['contestant'], row['size']): row for row in measured}
    body = [
        [_with_grouping(name), *(f'{float(found[name, size]["peak_mib"]):.0f}' if (name, size) in found else ''
                                 for size in columns)]
        for name in dict.fromkeys(row['contestant'] for row in measured)
    ]
    head = [f'peak MiB, feature pyramid, batch 1, fp32 ({hardware(measured)})', *columns]
    return markdown(head, body, 'python benchmarks/bench.py memory')


@table
def compiled(results: Path) -> str:
    """torch.compile against eager."""
    rows = Results(results)
    body = []
    for row in rows.select('compile', mode='compile'):
        where = {name: row[name] for name in ('contestant', 'size', 'batch', 'threads', 'task')}
        ratio = rows.ratio('compile', where, {**where, 'mode': 'compile'})
        body.append([short(row['contestant']), row['size'], row['batch'], row['threads'], *_times([ratio])])
    head = ['model', 'px', 'batch', 'threads', 'faster than eager']
    return markdown(head, body, 'python benchmarks/bench.py compile')


@table
def operators(results: Path) -> str:
    """Where the time goes, by kind of operator."""
    rows = _read(results / 'operators.csv')
    about = {'contestant', 'task', 'size', 'batch', 'threads', 'hardware', 'torch', 'timm'}
    kinds = [name for name in rows[0] if name not in about] if rows else []
    what = {'logits': 'inference', 'features': 'inference', 'train': 'training step'}
    body = []
    for row in rows:
        case = f'{what[row["task"]]}, {row["size"]} px, batch {row["batch"]}'
        name = short(row['contestant'].partition(' drop_path_rate')[0])
        body.append([name, case, row['threads'], *(row[kind] for kind in kinds)])
    return markdown(['ms', 'case', 'threads', *kinds], body, 'python benchmarks/operators.py')


@table
def targets(results: Path) -> str:
    """Targets and what was measured."""
    return markdown(*targets_table(results))


@table
def versions(results: Path) -> str:
    """Say what the package needs, and which versions CI runs."""
    needs, floors = ci.read()['project']['requires-python'], ci.floors()
    head = ['Python', 'torch', 'timm', 'tests', 'command']
    body = [[*(run[key] for key in ('python', 'torch', 'timm', 'tests')), f'`{run["command"]}`'] for run in ci.runs()]
    return (
        f'It needs Python {needs.replace(">=", "")}, torch {floors["torch"]} and timm {floors["timm"]}, or newer. '
        f'CI runs these, on Linux and CPU:\n\n{markdown(head, body)}')


@table
def csv_file(results: Path, name: str, *columns: str) -> str:
    """Show a CSV file below benchmarks/results as it is, all columns or the named ones."""
    rows = _read(results / name)
    if not rows:
        return f'Not measured yet: benchmarks/results/{name}.\n'
    names = list(columns or rows[0])
    return markdown(names, [[row[column] for column in names] for row in rows])


@table
def peers(results: Path) -> str:
    """Compare the networks that were trained alike, over their seeds."""
    rows = _read(results / 'train' / 'peers.csv')
    runs: Dict[str, List[Row]] = {}
    for row in rows:
        runs.setdefault(row['model'], []).append(row)
    budget = '{data}, {train_images} images, {epochs} epochs, {img_size} px'.format(**rows[0]) if rows else ''
    head = [budget, 'parameters', 'MMACs', 'seeds', 'accuracy, mean', 'lowest to highest', 'CPU s per epoch']
    body = []
    for name, own in runs.items():
        accuracies = [float(row['accuracy']) for row in own]
        body.append([
            name, own[0]['parameters'], own[0]['mmacs'], len(own), f'{statistics.mean(accuracies):.1f}',
            f'{min(accuracies):.1f} to {max(accuracies):.1f}',
            f'{statistics.median(float(row["cpu_seconds_per_epoch"]) for row in own):.1f}'])
    return markdown(head, body, 'python benchmarks/peers.py')


def _read(path: Path) -> List[Row]:
    """Return the rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def _times(ratios: Sequence[Optional[float]]) -> List[str]:
    return [f'{ratio:.2f}×' if ratio else '' for ratio in ratios]


def _with_grouping(name: str) -> str:
    """Name a variant with the grouping it runs with."""
    if any(f'lda_grouping={grouping}' in name for grouping in LDA_GROUPINGS) or not name.startswith('crossformer_'):
        return short(name)
    first, *options = name.split()
    return short(' '.join([first, f'lda_grouping={"region" if "_pp_" in first else "map"}', *options]))


# ---- files


def fill(text: str, results: Path = RESULTS) -> str:
    """Write all tables of a text anew.

    Raises:
        ValueError: A table has no name that is known, or no end.
    """
    starts, blocks = text.count('<!-- table: '), len(BLOCK.findall(text))
    if starts != blocks:
        raise ValueError(f'Each `<!-- table: NAME -->` needs a `<!-- /table -->` below, got {starts} and {blocks}.')

    def block(match: re.Match) -> str:
        name, *args = match['name'].split()
        if name not in TABLES:
            raise ValueError(f'A table is one of {", ".join(TABLES)}, got {name!r}.')
        return match[1] + TABLES[name](results, *args) + match[3]

    return BLOCK.sub(block, text)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write or check files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='*', type=Path, default=FILES, help='Markdown files, the READMEs by default')
    parser.add_argument('--check', action='store_true', help='only compare')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the CSV files')
    args = parser.parse_args(argv)
    stale = []
    for path in args.files:
        text = path.read_text(encoding='utf-8')
        filled = fill(text, args.results)
        if filled != text:
            stale.append(path)
            if not args.check:
                path.write_text(filled, encoding='utf-8')
    for path in stale:
        print(f'{path}: {"differs; run `python benchmarks/readme.py`" if args.check else "written"}')
    return 1 if stale and args.check else 0


if __name__ == '__main__':
    sys.exit(main())
