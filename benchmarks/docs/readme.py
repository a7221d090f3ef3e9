"""Fill the tables of the READMEs and of docs/ from result files, so that no number is typed by hand.

    python benchmarks/docs/readme.py            write
    python benchmarks/docs/readme.py --check    exit with 1 if a file differs from what would be written

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. NAME is one of `TABLES`; words after it are
arguments, as in `<!-- table: csv_file train/peers.csv model accuracy -->`.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pandas as pd
import versions as ci

sys.path.append(str(Path(__file__).parents[1] / 'speed'))  # what most tables are about

import cases
import rows
import targets as goals
from cases import BIRDER, FORM, OURS, PP_SMALL, SIZES, SWIN, VIT_PYTORCH, size_contestants
from rows import RESULTS

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'benchmarks' / 'README.md',
    *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(<!-- table: (?P<name>[^\n]*?) -->\n).*?(<!-- /table -->)', re.DOTALL)

TABLES: Dict[str, Callable[..., str]] = {}


def table(make: Callable[..., str]) -> Callable[..., str]:
    """Register a table under the function's name."""
    TABLES[make.__name__] = make
    return make


def markdown(frame: pd.DataFrame, command: str = '') -> str:
    """Write a table of text; columns in which every cell is empty are left out.

    Args:
        frame: Cells; None and NaN are empty.
        command: What to run where there are no rows.
    """
    frame = frame.astype(object).where(frame.notna(), '').astype(str)
    frame = frame.loc[:, (frame != '').any()]
    if frame.empty:
        return f'Not measured yet: `{command}`.\n'
    rules = ['---:' if frame[name].str.fullmatch(r'[-+≥≤×%.,\d ]*').all() else '---' for name in frame]
    return ''.join(f'| {" | ".join(line)} |\n' for line in [list(frame), rules, *frame.to_numpy().tolist()])


def hardware(measured: pd.DataFrame) -> str:
    """Say where rows were measured: once, for the heading of a column."""
    return '; '.join(dict.fromkeys(measured['hardware'] + ', torch ' + measured['torch']))


def threads_words(threads: int) -> str:
    """Write a number of threads."""
    return f'{threads} thread{"s" if threads > 1 else ""}'


def short(contestant: str) -> str:
    """Name a contestant as a table does."""
    names = {BIRDER: 'birder crossformer_s', VIT_PYTORCH: 'vit-pytorch CrossFormer', SWIN: 'swin_tiny'}
    name, *options = contestant.split()
    options = [option for option in options if not option.startswith('drop_path_rate')]
    form = ', inference form' if FORM.strip() in options else ''
    words = [o.removeprefix('lda_grouping=').removesuffix('=True') for o in options if o != FORM.strip()]
    return ' '.join([names.get(name, name), *words]) + form


def grouped(contestant: str) -> str:
    """Name a variant with the grouping it runs with."""
    name, *options = contestant.split()
    if name in OURS[:3] and not any(option.startswith('lda_grouping') for option in options):
        options.insert(0, 'region' if name == PP_SMALL else 'map')
    return short(' '.join([name, *options]))


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """Read a CSV file, without rows if there is no such file."""
    return pd.read_csv(path, **options) if path.exists() else pd.DataFrame()


def _text(values: pd.Series, form: str) -> pd.Series:
    return values.map(lambda value: '' if pd.isna(value) else form.format(value))


def _faster(*ratios: Optional[float]) -> List[str]:
    return [f'{ratio:.2f}×' if ratio else '' for ratio in ratios]


# ---- tables of results


@table
def speed(results: Path) -> str:
    """Inference of each network at 224 px and of a large image, and its memory."""
    infer = rows.read(results, 'infer', mode='eager')
    measured = rows.latest(rows.pick(infer, size='224', task='logits'))
    threads = measured['threads'].max()
    measured = measured.assign(rate=1e3 * measured['batch'] / measured['median_ms']).set_index('contestant')
    names = [name for name in [*OURS, *cases.FORMS, *cases.PEERS] if name in measured.index]
    if not names:
        return markdown(pd.DataFrame(), 'python benchmarks/speed/bench.py infer')
    facts = measured[~measured.index.duplicated()].loc[names]
    body = {f'fp32, 224 px ({hardware(measured)})': [short(name) for name in names],
            'params (M)': _text(facts['params_m'], '{:.1f}'), 'GMACs': _text(facts['gmacs'], '{:.2f}')}
    for (n, batch), cell in measured.groupby(['threads', 'batch']):
        body[f'img/s, {threads_words(n)}, batch {batch}'] = _text(cell['rate'].reindex(names), '{:.1f}')
    case = {'size': '224', 'task': 'logits', 'batch': measured['batch'].max(), 'threads': threads}
    body['of matrix rate'] = _text(cell['gemm_share'].reindex(names), '{:.0%}')  # of the last of these columns
    per_mac = [rows.ratio(infer, {**case, 'contestant': name}, {**case, 'contestant': SWIN}, per='macs')
               for name in names]
    body['time per MAC over Swin'] = _text(pd.Series(per_mac, facts.index, dtype=float), '{:.2f}')
    large = rows.latest(rows.pick(infer, size='800x1344', task='features', threads=threads)).set_index('contestant')
    body['ms, 800x1344 px'] = _text(large['median_ms'].reindex(names), '{:.0f}')
    peaks = rows.latest(rows.read(results, 'memory', size='800x1344')).set_index('contestant')['peak_mib']
    body['peak MiB, 800x1344 px'] = _text(peaks.reindex(names), '{:.0f}')
    return markdown(pd.DataFrame(body))


@table
def speed_lines(results: Path) -> str:
    """Say the same of five networks, and how fast other packages are, in a line each."""
    infer = rows.read(results, 'infer', mode='eager', size='224', task='logits')
    where = {'hardware': next(iter(rows.machines(infer)), None)}  # the last
    infer = rows.pick(infer, threads=infer['threads'].max(), batch=infer['batch'].max(), **where)
    measured = rows.latest(infer)
    if measured.empty:
        return markdown(measured, 'python benchmarks/speed/bench.py infer')
    first = measured.iloc[0]
    threads = threads_words(first['threads'])
    large = rows.latest(rows.read(
        results, 'infer', mode='eager', size='800x1344', task='features', threads=first['threads'], **where))
    peaks = rows.latest(rows.read(results, 'memory', size='800x1344', **where))
    same = []
    for peer, ours in cases.PEER_OF_SAME_NETWORK.items():
        ratio = rows.ratio(infer, {'contestant': peer}, {'contestant': ours})
        same += [f'{short(ours)} against {short(peer)} {ratio:.2f}×'] if ratio else []
    rates = measured.assign(rate=1e3 * measured['batch'] / measured['median_ms'])
    form = rates['contestant'].str.endswith(FORM)
    forms = rates[form]
    forms = forms.assign(contestant=forms['contestant'].str.removesuffix(FORM))
    exported = rows.latest(rows.read(
        results, 'deploy', mode='onnxruntime', size='224', batch=1, threads=first['threads'], **where))
    lines = {
        f'Images per second at 224 px, batch {first["batch"]}': _few(rates[~form], 'rate', '{:.1f}'),
        'The same in the inference form': _few(forms, 'rate', '{:.1f}'),
        'Milliseconds for one image of 224 px in ONNX Runtime': _few(exported, 'median_ms', '{:.0f}'),
        'Milliseconds for the pyramid of one image of 800x1344 px': _few(large, 'median_ms', '{:.0f}'),
        'Peak MiB of that, beyond weights and image': _few(peaks, 'peak_mib', '{:.0f}'),
        f'How much faster the same network is, batch {first["batch"]}': ', '.join(same),
    }
    found = ''.join(f'- {what}: {values}.\n' for what, values in lines.items() if values)
    return f'{found}- All in fp32, by {threads}, on {hardware(measured)}.\n'


def _few(measured: pd.DataFrame, column: str, form: str) -> str:
    """Write a value of three networks of ours, and of two peers of their size."""
    values = measured.set_index('contestant')[column]
    ours, peers = (', '.join(f'{short(name)} {form.format(values[name])}' for name in names if name in values)
                   for names in (OURS[:3], (SWIN, cases.CONVNEXT)))
    return '; '.join(filter(None, (ours, peers)))


@table
def ratios(results: Path) -> str:
    """How much faster our models are than the peers of the same network, on each processor that was at hand."""
    infer, train = (rows.read(results, what) for what in ('infer', 'train'))
    same = [(ours, peer) for peer, ours in cases.PEER_OF_SAME_NETWORK.items()]
    plan = [(infer, *pair, 'logits', batch, f'inference, batch {batch}') for pair in same for batch in (1, 8)]
    plan += [(train, *pair, 'train', 8, 'training step, batch 8')
             for pair in ((cases.SMALL_TRAINED, BIRDER), same[1])]
    body = []
    for machine in dict.fromkeys([*rows.machines(infer), *rows.machines(train)]):
        for measured, ours, peer, task, batch, words in plan:
            where = {'task': task, 'size': '224', 'batch': batch, 'hardware': machine}
            found = [rows.ratio(measured, {**where, 'contestant': peer, 'threads': threads},
                                {**where, 'contestant': ours, 'threads': threads}) for threads in (1, 2)]
            if any(found):
                body.append([short(ours), short(peer), words, *_faster(*found), machine])
    head = ['the same network', 'against', 'at 224 px', 'faster, 1 thread', 'faster, 2 threads', 'on']
    return markdown(pd.DataFrame(body, columns=head), 'python benchmarks/speed/bench.py infer')


@table
def sizes(results: Path, fit: str = '') -> str:
    """Time per megapixel by image size, and time per multiply-add over that at 224; `fit` for fit_groups."""
    everything = rows.read(results, 'sizes')
    everything = rows.pick(everything, threads=everything['threads'].max())
    names = [*size_contestants(bool(fit)), *([] if fit else [SWIN])]
    measured = rows.latest(everything)
    measured = measured[measured['contestant'].isin(names)]
    body = []
    for row in measured.itertuples():
        relative = rows.ratio(everything, {'contestant': row.contestant, 'size': row.size},
                              {'contestant': row.contestant, 'size': '224'}, per='macs')
        pace = f'{row.median_ms / row.megapixels:.0f}'
        body.append([row.contestant, row.size, f'{pace} ({relative:.2f})' if relative and row.size != '224' else pace])
    head = f'ms per megapixel, batch 1, fp32{_where(measured)}'
    return _by_size(body, names, head, 'python benchmarks/speed/bench.py sizes')


@table
def memory(results: Path) -> str:
    """Peak memory of inference by image size, beyond weights and input."""
    measured = rows.latest(rows.read(results, 'memory'))
    body = [[row.contestant, row.size, f'{row.peak_mib:.0f}'] for row in measured.itertuples()]
    names = [*OURS[:3], *dict.fromkeys(measured['contestant'])]
    head = f'peak MiB, feature pyramid, batch 1, fp32 ({hardware(measured)})'
    return _by_size(body, list(dict.fromkeys(names)), head, 'python benchmarks/speed/bench.py memory')


def _by_size(body: List[List[str]], names: Sequence[str], head: str, command: str) -> str:
    """Write cells (contestant, size, text) as a table with a column for each size."""
    cells = pd.DataFrame(body, columns=['name', 'size', 'text']).pivot(index='name', columns='size', values='text')
    cells = cells.reindex(index=[name for name in names if name in cells.index],
                          columns=[size for size in SIZES if size in cells])
    cells.insert(0, head, [grouped(name) for name in cells.index])
    return markdown(cells, command)


@table
def compiled(results: Path) -> str:
    """torch.compile against eager; in parentheses, the time per multiply-add over that of Swin compiled alike."""
    measured = rows.read(results, 'compile')
    ways = {'compile': 'torch.compile', 'compile-frozen': 'with frozen weights'}
    body = []
    for row in rows.pick(rows.latest(measured), mode='eager').itertuples():
        where = {name: getattr(row, name) for name in ('size', 'batch', 'threads', 'task')}
        cells = []
        for mode in ways:
            ours = {**where, 'contestant': row.contestant, 'mode': mode}
            faster = rows.ratio(measured, {**ours, 'mode': 'eager'}, ours)
            per_mac = rows.ratio(measured, ours, {**ours, 'contestant': SWIN}, per='macs')
            cells.append(f'{faster:.2f}× ({per_mac:.2f})' if faster and per_mac else '')
        body.append([short(row.contestant), row.size, row.batch, row.threads, *cells])
    head = ['faster than eager', 'px', 'batch', 'threads', *ways.values()]
    return markdown(pd.DataFrame(body, columns=head), 'python benchmarks/speed/bench.py compile')


DEPLOYED = {
    'eager': 'PyTorch', 'form': 'inference form', 'compile-frozen': 'torch.compile', 'onnxruntime': 'ONNX Runtime',
    'openvino': 'OpenVINO', 'onnxruntime-int8': 'ONNX Runtime, int8', 'openvino-int8': 'OpenVINO, int8'}


def deployment(results: Path) -> pd.DataFrame:
    """Return the last rows of the part `deploy`, with `name` and `way`, one of the values of `DEPLOYED`."""
    measured = rows.latest(rows.read(results, 'deploy'))
    form = measured['contestant'].str.contains(FORM, regex=False)
    return measured.assign(
        name=measured['contestant'].str.replace(FORM, '', regex=False).map(short),
        way=measured['mode'].mask(form, 'form').map(DEPLOYED))


@table
def deployed(results: Path) -> str:
    """Milliseconds of a batch in each runtime; in parentheses, the time per multiply-add over that of Swin there."""
    measured = deployment(results)
    everything = rows.read(results, 'deploy')
    body = []
    for row in measured.itertuples():
        where = {'size': row.size, 'batch': row.batch, 'task': row.task}
        ratio = rows.ratio(everything, {**where, 'contestant': row.contestant, 'mode': row.mode},
                           {**where, 'contestant': SWIN, 'mode': row.mode}, per='macs')
        case = f'{row.size} px, batch {row.batch}'
        body.append([f'{row.name}, {case}', row.way, f'{row.median_ms:.0f}' + (f' ({ratio:.2f})' if ratio else '')])
    cells = pd.DataFrame(body, columns=['name', 'way', 'text'])
    head = f'ms, fp32 but for int8{_where(measured)}'
    table = cells.pivot(index='name', columns='way', values='text').reindex(
        index=cells['name'].drop_duplicates(), columns=[way for way in DEPLOYED.values() if way in set(cells['way'])])
    table.insert(0, head, table.index)
    return markdown(table, 'python benchmarks/speed/bench.py deploy')


def _where(measured: pd.DataFrame) -> str:
    """Say with how many threads rows were measured, and where, for the heading of a column."""
    return '' if measured.empty else f', {threads_words(measured["threads"].max())} ({hardware(measured)})'


@table
def operators(results: Path) -> str:
    """Where the time goes, by kind of operator."""
    frame = read_csv(results / 'operators.csv', dtype=str)
    if not frame.empty:
        task = frame['task'].map({'logits': 'inference', 'features': 'inference', 'train': 'training step'})
        frame.insert(0, 'ms', frame['contestant'].map(short))
        frame.insert(1, 'case', task + ', ' + frame['size'] + ' px, batch ' + frame['batch'])
        frame = frame.drop(columns=['contestant', 'task', 'size', 'batch', 'hardware', 'torch', 'timm'])
    return markdown(frame, 'python benchmarks/speed/operators.py')


@table
def roofline(results: Path) -> str:
    """The estimate for GPUs, summed over kinds of operators."""
    frame = read_csv(results / 'roofline.csv')
    if not frame.empty:
        frame = rows.pick(frame, dtype='bf16').groupby(['model', 'size', 'batch'], sort=False).sum(numeric_only=True)
        frame = frame.reset_index()
        cards = [name for name in frame if name.endswith('_ms_estimate')]
        frame = pd.DataFrame({
            'estimate, bf16, eager': frame['model'].map(short), 'px': frame['size'], 'batch': frame['batch'],
            'launches': frame['launches'], 'GFLOP': _text(frame['gflops'], '{:.0f}'),
            'MiB moved': _text(frame['mib'], '{:.0f}'),
            **{f'estimated ms, {name.partition("_")[0]}': _text(frame[name], '{:.2f}') for name in cards}})
    return markdown(frame, 'python benchmarks/speed/roofline.py')


@table
def targets(results: Path) -> str:
    """Targets and what was measured."""
    return markdown(goals.table(results))


@table
def cost(results: Path) -> str:
    """What a run of everything took."""
    frame = read_csv(results / 'cost.csv')
    if frame.empty:
        return 'Its cost is not measured yet; `bench.py all` writes it.\n'
    parts = ', '.join(f'{row.part} {row.seconds / 60:.1f}' for row in frame.itertuples())
    return (f'The last run of `{frame["command"][0]}` took {frame["seconds"].sum() / 60:.0f} minutes on '
            f'{frame["hardware"][0]}: {parts}.\n')


@table
def csv_file(results: Path, name: str, *columns: str) -> str:
    """Show a CSV file below benchmarks/results as it is, all columns or the named ones."""
    frame = read_csv(results / name, dtype=str, keep_default_na=False)
    if frame.empty:
        return f'Not measured yet: benchmarks/results/{name}.\n'
    return markdown(frame[list(columns or frame)])


@table
def peers(results: Path, name: str = 'peers') -> str:
    """Compare the networks that were trained alike, over their seeds: benchmarks/results/train/NAME.csv."""
    frame = read_csv(results / 'train' / f'{name}.csv', dtype={'mmacs': str})
    if frame.empty:
        return markdown(frame, 'python benchmarks/training/peers.py')
    budget = '{data}, {train_images} images, {epochs} epochs, {img_size} px'.format(**frame.iloc[0])
    runs = frame.groupby('model', sort=False)
    accuracy = runs['accuracy']
    return markdown(pd.DataFrame({
        budget: list(runs.groups), 'parameters': runs['parameters'].first(), 'MMACs': runs['mmacs'].first(),
        'seeds': runs.size(), 'accuracy, mean': _text(accuracy.mean(), '{:.1f}'),
        'lowest to highest': _text(accuracy.min(), '{:.1f}') + _text(accuracy.max(), ' to {:.1f}'),
        'CPU s per epoch': _text(runs['cpu_seconds_per_epoch'].median(), '{:.1f}')}))


# ---- tables of other files


@table
def variants(results: Path, root: Path = ROOT) -> str:
    """Variants: parameters and multiply-adds counted, accuracy as its origin states it."""
    counted = read_csv(results / 'variants.csv')
    records = [] if counted.empty else _manifest(root)
    # Those with published weights first, CrossFormer before CrossFormer++, then by size.
    published = {record['tag'].partition('.')[0] for record in records if record['metrics']}
    body = []
    for row in sorted(counted.itertuples(), key=lambda row: (
            row.variant not in published, '_pp_' in row.variant, row.gmacs)):
        mine = [record for record in records if record['tag'].partition('.')[0] == row.variant]
        stated = [record for record in mine if record['metrics'] and not record.get('dense')]
        body.append([
            f'`{row.variant}`', f'{row.params_m:.1f}', f'{row.gmacs:.2f}', row.size,
            '; '.join(_accuracy(metric) for record in stated for metric in record['metrics']),
            '; '.join(dict.fromkeys(record['license'] or 'not stated' for record in stated)),
        ])
    head = ['variant', 'params (M)', 'GMACs', 'at px', 'top-1 on ImageNet-1k (source)', 'licence of weights']
    return markdown(pd.DataFrame(body, columns=head), 'python benchmarks/speed/bench.py variants')


@table
def choice(results: Path, root: Path = ROOT) -> str:
    """Variants with a published accuracy on ImageNet, in short."""
    counted = read_csv(results / 'variants.csv')
    stated = {} if counted.empty else {
        record['tag'].partition('.')[0]: metric['value']
        for record in _manifest(root) for metric in record['metrics'][:1]
        if metric['name'] == 'top-1' and metric['dataset'].startswith('ImageNet-1k')}
    body = [[f'`{row.variant}`', f'{row.params_m:.1f}', f'{row.gmacs:.1f}', f'{stated[row.variant]:.1f}']
            for row in counted.itertuples() if row.variant in stated]
    body.sort(key=lambda row: ('_pp_' in row[0], float(row[2])))
    head = ['variant', 'params (M)', 'GMACs', 'top-1 (%), as its authors state it']
    return markdown(pd.DataFrame(body, columns=head), 'python benchmarks/speed/bench.py variants')


@table
def weight_families(results: Path, root: Path = ROOT) -> str:
    """Weights in short: those that differ in the size of the network alone stand in one row."""
    families: Dict[Any, List[Dict[str, Any]]] = {}
    for record in _manifest(root):
        variant, _, name = record['tag'].partition('.')
        stem, _, size = variant.rpartition('_')
        families.setdefault((stem, name, _hosts(record)), []).append({**record, 'size': size})
    body = []
    for (stem, name, hosts), members in families.items():
        sizes = [record['size'] for record in members]
        first = [record['metrics'][0] for record in members if record['metrics']]
        body.append([
            f'`{stem}_{sizes[0] if len(sizes) == 1 else "{" + ",".join(sizes) + "}"}.{name}`',
            '; '.join(dict.fromkeys(metric['dataset'] for metric in first)),
            ', '.join(str(metric['value']) for metric in first) + (f' {first[0]["name"]}' if first else ''),
            hosts,
        ])
    return markdown(pd.DataFrame(body, columns=['weights', 'measured on', 'metric', 'hosts']))


@table
def weights(results: Path, root: Path = ROOT) -> str:
    """Weights by name: metric, hosts and licence, from the manifest."""
    body = []
    for record in _manifest(root):
        metrics: Dict[str, List[str]] = {}
        for metric in record['metrics']:
            metrics.setdefault(metric['source'], []).append(f'{metric["value"]} {metric["name"]}')
        data = dict.fromkeys(metric['dataset'] for metric in record['metrics'])
        body.append([
            f'`{record["tag"]}`',
            '; '.join(f'{", ".join(values)} ({source})' for source, values in metrics.items()),
            '; '.join(data),
            _hosts(record),
            record['license'],
        ])
    return markdown(pd.DataFrame(body, columns=['weights', 'metric (source)', 'on', 'hosts', 'licence']))


def _manifest(root: Path) -> List[Dict[str, Any]]:
    return json.loads((root / 'weights' / 'manifest.json').read_text(encoding='utf-8'))['weights']


def _hosts(record: Dict[str, Any]) -> str:
    """Name the hosts of a record of the manifest."""
    words = {'drive': 'Google Drive', 'hub': 'Hugging Face Hub', 'package': 'this package', 'browser': 'Baidu'}
    kinds = [source['kind'] for source in record['sources']]
    return ', '.join(words.get(kind, kind) + ' by hand' * (kind == 'browser') for kind in kinds)


def _accuracy(metric: Dict[str, Any]) -> str:
    """Write a metric of the manifest; only what is not in the heading is named."""
    what = '' if metric['name'] == 'top-1' else f'{metric["name"]} '
    data = '' if metric['dataset'].startswith('ImageNet-1k') else f'on {metric["dataset"]} '
    return f'{metric["value"]} {what}{data}({metric["source"]})'


@table
def needs(results: Path) -> str:
    """Say what the package needs."""
    python, floors = ci.read()['project']['requires-python'], ci.floors()
    return (
        f'It needs Python {python.replace(">=", "")}, torch {floors["torch"]} and timm {floors["timm"]}, or newer.\n')


@table
def versions(results: Path) -> str:
    """Say which versions CI runs."""
    frame = pd.DataFrame(ci.runs()).assign(command=lambda runs: '`' + runs['command'] + '`')
    return markdown(frame.rename(columns={'python': 'Python'})[['Python', 'torch', 'timm', 'tests', 'command']])


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
    parser.add_argument('files', nargs='*', type=Path, default=FILES, help='Markdown files, all with tables by default')
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
        print(f'{path}: {"differs; run `python benchmarks/docs/readme.py`" if args.check else "written"}')
    return 1 if stale and args.check else 0


if __name__ == '__main__':
    sys.exit(main())
