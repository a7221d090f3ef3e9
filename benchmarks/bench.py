"""Measure CrossFormer and its peers: a case is data, `measure` runs cases in turn, a result is a row of a CSV file.

    python benchmarks/bench.py all --quick     everything the READMEs quote
    python benchmarks/bench.py infer           one part of it; `--help` lists the parts and their options
    python benchmarks/bench.py targets         what the rows in benchmarks/results say about the targets

Contestants take turns (A B C A B C ...), so a slow moment of the machine hits all of them, and a ratio of two of them
is the median over rounds of the ratios within a round. Every round begins with a large matrix product: the rate that
the machine has at that moment.
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from ast import literal_eval
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from timm_crossformer.ops.grouping import LDA_GROUPINGS  # importing the package registers the models

RESULTS = Path(__file__).parent / 'results'

SWIN = 'swin_tiny_patch4_window7_224'
BIRDER = 'birder/crossformer_s'
VIT_PYTORCH = 'vit_pytorch/CrossFormer'
OURS = ['crossformer_tiny', 'crossformer_small', 'crossformer_pp_small', 'crossformer_lucidrains']
PEERS = [BIRDER, VIT_PYTORCH, SWIN, 'convnext_tiny', 'hiera_tiny_224', 'twins_svt_small']
PEER_OF_SAME_NETWORK = {BIRDER: 'crossformer_small', VIT_PYTORCH: 'crossformer_lucidrains'}  # at 224 px
TAKES_IMG_SIZE = {SWIN, 'hiera_tiny_224', 'twins_svt_small'}  # the others run at any size, or not at all
PADS_WINDOWS = {SWIN}

SIZES = ['224', '256', '288', '320', '384', '512', '640', '800x1344', '1024', '2048']
DTYPES = {
    'fp32': torch.float32,
    'bf16': torch.bfloat16,
    'fp16': torch.float16,
    'amp-bf16': torch.bfloat16,  # fp32 weights under autocast
    'amp-fp16': torch.float16,
}
MODES = {
    'eager': 'as created',
    'compile': 'torch.compile',
}
GEMM_SIDE = {'cpu': 2048, 'cuda': 8192}

Row = Dict[str, Any]
KEY = ('contestant', 'task', 'mode', 'size', 'batch', 'dtype', 'device', 'threads')
COLUMNS = (
    'run', *KEY, 'params_m', 'gmacs', 'rounds', 'median_ms', 'min_ms', 'gflops', 'gemm_gflops', 'gemm_share',
    'peak_mib', 'times_ms', 'hardware', 'torch', 'timm',
)


class WrongResult(Exception):
    """A contestant computed something it should not."""


# ---- cases


@dataclass(frozen=True)
class Case:
    """What to measure.

    contestant: A timm model, `birder/NAME` or `vit_pytorch/CrossFormer`, then constructor arguments of timm models:
        'crossformer_small lda_grouping=region fit_groups=True'.
    task: 'logits', 'features' (the pyramid, without a head) or 'train' (forward, backward and AdamW step).
    mode: One of `MODES`.
    size: Pixels, '224' or '800x1344'.
    threads: Of the CPU, also with device 'cuda'.
    """

    contestant: str
    task: str = 'logits'
    mode: str = 'eager'
    size: str = '224'
    batch: int = 1
    dtype: str = 'fp32'
    device: str = 'cpu'
    threads: int = 1

    @property
    def pixels(self) -> Tuple[int, int]:
        """Height and width."""
        height, _, width = self.size.partition('x')
        return int(height), int(width or height)


@functools.lru_cache(maxsize=32)
def build(
        contestant: str, task: str, mode: str, pixels: Optional[Tuple[int, int]], dtype: str, device: str,
) -> Tuple[nn.Module, Callable]:
    """Create a model and what is to be called of it.

    Args:
        pixels: Image size, for models that are built for one.
        (others): As in `Case`.
    """
    if mode == 'compile':  # of the same weights in the same memory: copies differ by 3% in time
        model, forward = build(contestant, task, 'eager', pixels, dtype, device)
        return model, torch.compile(forward)
    torch.manual_seed(0)
    name, *options = contestant.split()
    if name == VIT_PYTORCH:
        from vit_pytorch.crossformer import CrossFormer
        model = CrossFormer()
    elif name.startswith('birder/'):
        from birder.model_registry import registry
        model = registry.net_factory(name.partition('/')[2], 1000, size=pixels)
    else:
        args = {key: _value(text) for key, _, text in (option.partition('=') for option in options)}
        if pixels is not None:
            args['img_size'] = pixels
        if task == 'features':
            args['features_only'] = True
        model = timm.create_model(name, **args)
    if not dtype.startswith('amp'):
        model = model.to(DTYPES[dtype])
    model = model.to(device).train(task == 'train')
    forward = model.detection_features if task == 'features' and name.startswith('birder/') else model
    if task == 'features' and name == VIT_PYTORCH:
        raise ValueError(f'{VIT_PYTORCH} returns logits only, got the task `features`. Leave it out of `--models`.')
    return model, forward


def _value(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build_case(case: Case) -> Tuple[nn.Module, Callable]:
    """Create the model of a case; cases that differ in image size, batch or threads alone share it if they can."""
    name = case.contestant.split()[0]
    pixels = case.pixels if name in TAKES_IMG_SIZE or name.startswith('birder/') else None
    return build(case.contestant, case.task, case.mode, pixels, case.dtype, case.device)


def prepare(case: Case) -> Callable[[], Any]:
    """Return a function that runs a case once and returns its output."""
    model, forward = build_case(case)
    amp = case.dtype.startswith('amp')
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, *case.pixels, generator=generator)
    x = x.to(case.device, torch.float32 if amp else DTYPES[case.dtype])
    target = torch.randint(10, (case.batch,), generator=generator).to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if case.task == 'train' else None

    def infer() -> Any:
        with torch.inference_mode(), torch.autocast(case.device, DTYPES[case.dtype], enabled=amp):
            return forward(x)

    def train() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device, DTYPES[case.dtype], enabled=amp):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return infer if optimizer is None else train


def count_macs(case: Case) -> float:
    """Run a case twice and count its multiply-adds, by torch's counter of operations, on tokens that exist.

    Swin pads its map to whole windows: its count at 224, where it does not, is scaled by the area.
    """
    if case.contestant in PADS_WINDOWS and case.size != '224':
        height, width = case.pixels
        return count_macs(replace(case, size='224')) * height * width / 224 ** 2
    run = prepare(replace(case, mode='eager'))
    run()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def same_networks(cases: Sequence[Case]) -> Iterator[Tuple[Case, Case]]:
    """List pairs of cases (peer, ours) whose outputs have to be equal once they have equal weights."""
    for case in cases:
        other = replace(case, contestant=PEER_OF_SAME_NETWORK.get(case.contestant, ''))
        if other in cases and case.size == '224' and case.task == 'logits':
            yield case, other
        eager = replace(case, mode='eager')
        if case.mode == 'compile' and eager in cases and case.task == 'logits':
            yield eager, case


# ---- runs


def measure(
        cases: Sequence[Case],
        seconds: float = 10.,
        min_rounds: int = 3,
        progress: Optional[Callable[[str], None]] = None,
) -> List[Row]:
    """Time cases in turn: one call of each that is not counted, then rounds of one call of each.

    Args:
        cases: Of one device, dtype and number of threads.
        seconds: Start no further round after this time.
        min_rounds: Rounds to run in any case.
        progress: Called with a line on what happens.

    Raises:
        WrongResult: An output is not finite, or differs between equal networks with equal weights.
    """
    progress = progress or (lambda line: None)
    first = cases[0]
    if any((case.device, case.dtype, case.threads) != (first.device, first.dtype, first.threads) for case in cases):
        raise ValueError('Cases that run in turn need one device, dtype and number of threads.')
    torch.set_num_threads(first.threads)
    for peer, ours in same_networks(cases):
        build_case(ours)[0].load_state_dict(build_case(peer)[0].state_dict())
    runs, macs = [], []
    for case in cases:
        progress(f'warm-up: {case.contestant} {case.size}')
        macs.append(count_macs(case))
        runs.append(prepare(case))
        if case.mode != 'eager' or case.contestant in PADS_WINDOWS:  # else counting was the warm-up
            runs[-1]()
    gemm, gemm_macs = prepare_gemm(first)
    gemm()
    gemm_times: List[float] = []
    times: List[List[float]] = [[] for _ in cases]
    outputs: List[Any] = [None for _ in cases]
    start = time.perf_counter()
    while len(gemm_times) < min_rounds or time.perf_counter() - start < seconds:
        gemm_times.append(timed(gemm, first.device)[0])
        for i, case in enumerate(cases):
            progress(f'round {len(gemm_times)}: {case.contestant} {case.size}')
            outputs[i] = None
            elapsed, outputs[i] = timed(runs[i], case.device)
            times[i].append(elapsed)
    check_outputs(cases, outputs)
    rows = []
    for case, mac, t in zip(cases, macs, times, strict=True):
        rates = [2e-9 * mac / s for s in t]
        gemm_rates = [2e-9 * gemm_macs / s for s in gemm_times]
        shares = [rate / peak for rate, peak in zip(rates, gemm_rates, strict=True)]
        row = {
            **asdict(case),
            'params_m': round(sum(p.numel() for p in build_case(case)[0].parameters()) / 1e6, 4),
            'gmacs': round(mac / case.batch / 1e9, 4),
            'rounds': len(t),
            'median_ms': round(1e3 * statistics.median(t), 3),
            'min_ms': round(1e3 * min(t), 3),
            'gflops': round(statistics.median(rates), 2),
            'gemm_gflops': round(statistics.median(gemm_rates), 2),
            'gemm_share': round(statistics.median(shares), 4),
            'times_ms': ' '.join(f'{1e3 * s:.3f}' for s in t),
            **machine(case.device),
        }
        rows.append(row)
    return rows


def timed(run: Callable[[], Any], device: str) -> Tuple[float, Any]:
    """Run once; return seconds and output."""
    synchronize = torch.cuda.synchronize if device == 'cuda' else (lambda: None)
    synchronize()
    start = time.perf_counter()
    output = run()
    synchronize()
    return time.perf_counter() - start, output


def prepare_gemm(case: Case) -> Tuple[Callable[[], Any], float]:
    """Return a large square matrix product in the dtype of a case, and its multiply-adds.

    In fp32 on a CPU PyTorch has two, by its BLAS and by oneDNN; which one is faster depends on the processor.
    """
    side = GEMM_SIDE[case.device]
    a, b = torch.randn(2, side, side, device=case.device, dtype=DTYPES[case.dtype])
    products: List[Callable[[], Any]] = [functools.partial(torch.mm, a, b)]
    if a.dtype == torch.float32 and case.device == 'cpu' and torch.backends.mkldnn.is_available():
        products.append(functools.partial(torch.ops.mkldnn._linear_pointwise, a, b, None, 'none', [], ''))
    return min(products, key=lambda product: min(timed(product, case.device)[0] for _ in range(3))), side ** 3


def check_outputs(cases: Sequence[Case], outputs: Sequence[Any]) -> None:
    """Raise WrongResult unless outputs are finite, and equal where they have to be."""
    for case, output in zip(cases, outputs, strict=True):
        if not all(torch.isfinite(leaf).all() for leaf in _leaves(output)):
            raise WrongResult(f'{case.contestant} at {case.size} px in {case.dtype} returned infinity or NaN.')
    for peer, ours in same_networks(cases):
        expected = outputs[cases.index(peer)].float()
        actual = outputs[cases.index(ours)].float()
        tolerance = 1e-4 if ours.dtype == 'fp32' and ours.device == 'cpu' else 5e-2
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        if difference > tolerance:
            raise WrongResult(
                f'{ours.contestant} ({ours.mode}) and {peer.contestant} ({peer.mode}) are the same network and have '
                f'the same weights, but their outputs differ by {difference:.2g} of the largest one, more than '
                f'{tolerance:g}.')


def _leaves(output: Any) -> List[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values()) if isinstance(output, dict) else list(output)


def measure_memory(cases: Sequence[Case]) -> List[float]:
    """Measure peak memory in MiB, one case after the other in a process of their own."""
    done = subprocess.run(
        [sys.executable, __file__, 'memory-of', json.dumps([asdict(case) for case in cases])],
        stdout=subprocess.PIPE, text=True)
    if done.returncode:
        names = ', '.join(f'{case.contestant} at {case.size} px' for case in cases)
        raise WrongResult(f'{names}: the process ended with code {done.returncode}.')
    return json.loads(done.stdout)


def memory_of(case: Case) -> float:
    """Run a case once and return the most memory it needs beyond weights and input, in MiB. For a fresh process."""
    torch.set_num_threads(case.threads)
    with torch.inference_mode():  # loads kernels and libraries
        timm.create_model('test_crossformer').eval()(torch.zeros(1, 3, 64, 64))
    run = prepare(case)
    if case.device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2 ** 20, 2)
    before = _resident_mib()
    run()
    return round(_peak_mib() - before, 2)


def _resident_mib() -> float:
    """Return memory in use, and make it the peak so far: what building the model took on the way is forgotten."""
    with contextlib.suppress(OSError, AttributeError):  # glibc: give back memory that is free but kept
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return _peak_mib()
    return _status_mib('VmRSS')


def _peak_mib() -> float:
    """Return the most memory in use so far. Not `ru_maxrss` on Linux: it starts at what the parent process used."""
    try:
        return _status_mib('VmHWM')
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_mib(name: str) -> float:
    return int(Path('/proc/self/status').read_text().partition(f'{name}:')[2].split()[0]) / 1024


@functools.cache
def machine(device: str) -> Row:
    """Name the hardware and the versions."""
    if device == 'cuda':
        hardware = torch.cuda.get_device_name()
    else:
        cpu = Path('/proc/cpuinfo')
        text = cpu.read_text() if cpu.exists() else ''
        _, _, name = text.partition('model name')
        name = name.partition('\n')[0].strip('\t :') or platform.processor() or platform.machine()
        numbers = [re.search(rf'{what}\s*: (\d+)', text) for what in ('cpu family', 'model')]
        if all(numbers):  # the name of a virtual processor may be that of several generations
            name += f' (family {numbers[0][1]}, model {numbers[1][1]})'
        hardware = f'{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}'
    return {'hardware': hardware, 'torch': torch.__version__.partition('+')[0], 'timm': timm.__version__}


# ---- results


def write_rows(folder: Path, what: str, rows: Sequence[Row]) -> Path:
    """Append the rows of one run to the file of their kind, dtype, torch version and device."""
    first = rows[0]
    path = folder / f'{what}-{first["dtype"]}-{first["torch"]}-{first["device"]}.csv'
    old = read_rows(path) if path.exists() else []
    run = 1 + max((int(row['run']) for row in old), default=0)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='', lineterminator='\n')
        if not old:
            writer.writeheader()
        writer.writerows({**row, 'run': run} for row in rows)
    return path


def read_rows(path: Path) -> List[Row]:
    """Read a file of results.

    Raises:
        ValueError: The file has other columns.
    """
    with path.open(newline='') as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f'{path} has other columns than this version writes. Move it away and measure again.')
    return rows


class Results:
    """The rows of a folder. Where a case was measured more than once, the last run counts."""

    def __init__(self, folder: Path = RESULTS, **where: Any) -> None:
        """
        Args:
            folder: Where the files are.
            where: Values that the rows must have; fp32 on the CPU if not given.
        """
        self.folder = folder
        self.where = {'dtype': 'fp32', 'device': 'cpu', **where}

    @functools.cache  # noqa: B019  as long-lived as a command
    def _rows(self, what: str) -> List[Row]:
        paths = sorted(self.folder.glob(f'{what}-{self.where["dtype"]}-*-{self.where["device"]}.csv'))
        return [row for path in paths for row in read_rows(path)]

    def machines(self, what: str) -> List[str]:
        """List the hardware of the rows, that of the last run first."""
        return list(dict.fromkeys(row['hardware'] for row in reversed(self._rows(what))))

    def select(self, what: str, **where: Any) -> List[Row]:
        """Return the last row of each case that has these values, in the order of the file."""
        last: Dict[Tuple, Row] = {}
        for row in self._rows(what):
            if all(row[name] == str(value) for name, value in {**self.where, **where}.items()):
                last[tuple(row[name] for name in KEY)] = row
        return list(last.values())

    def ratio(self, what: str, top: Row, bottom: Row, per: str = '') -> Optional[float]:
        """Divide two cases of the last run that has both: the median over rounds, None if there is no such run.

        Args:
            top: Values that select the case above the line.
            bottom: Values that select the case below the line.
            per: 'mac' or 'pixel' divides the times by it, 'peak' compares peak memory, 'peak pixel' peak memory per
                pixel; 'gemm' gives the share of the matrix rate of the case above the line.
        """
        runs: Dict[str, List[Row]] = {}
        for row in self._rows(what):
            runs.setdefault(row['torch'] + row['run'], []).append(row)
        for rows in reversed(list(runs.values())):
            a, b = ([row for row in rows if all(
                row[name] == str(value) for name, value in {**self.where, 'mode': 'eager', **wanted}.items())]
                for wanted in (top, bottom))
            if a and b:
                return _ratio(a[0], b[0], per)
        return None


def _ratio(a: Row, b: Row, per: str) -> float:
    scale = 1.
    if per == 'mac':
        scale = work(b) / work(a)
    if per.endswith('pixel'):
        scale = megapixels(b) / megapixels(a)
    if per == 'gemm':
        return float(a['gemm_share'])
    if per.startswith('peak'):
        return scale * float(a['peak_mib']) / float(b['peak_mib'])
    return scale * statistics.median(s / t for s, t in zip(times_of(a), times_of(b), strict=True))


def times_of(row: Row) -> List[float]:
    """Return the time of every round in ms."""
    return [float(t) for t in row['times_ms'].split()]


def work(row: Row) -> float:
    """Return 10**9 multiply-adds of a row's whole batch."""
    return float(row['gmacs']) * int(row['batch'])


def megapixels(row: Row) -> float:
    """Return the megapixels of a row's whole batch."""
    height, width = Case('', size=row['size']).pixels
    return int(row['batch']) * height * width / 1e6


def compare(rows: Sequence[Row], reference: Sequence[Row], tolerance: float) -> List[str]:
    """Say which cases got slower or need more memory than the same ones of a reference, by more than a tolerance.

    Speed is compared as the share of the matrix rate measured in the same run, so that a machine that is slower as a
    whole is no slow-down.
    """
    old = {tuple(row[name] for name in KEY): row for row in reference}
    complaints = []
    for row in rows:
        before = old.get(tuple(str(row[name]) for name in KEY))
        if before is None:
            continue
        for name, inverse, what in (('gemm_share', True, 'slower'), ('peak_mib', False, 'more memory')):
            if row.get(name) and before[name]:
                growth = float(row[name]) / float(before[name])
                growth = 1 / growth if inverse else growth
                if growth > 1 + tolerance:
                    complaints.append(f'{describe(row)}: {growth - 1:.0%} {what} than before')
    return complaints


def describe(row: Row) -> str:
    """Name a row's case in a few words."""
    mode = '' if row['mode'] == 'eager' else f' {row["mode"]}'
    return (f'{row["contestant"]}{mode} {row["task"]} {row["size"]} px, batch {row["batch"]}, '
            f'{row["threads"]} thread{"s" if int(row["threads"]) > 1 else ""}')


def text_table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """Align cells for a terminal."""
    cells = [[str(cell) for cell in line] for line in (head, *body)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    return '\n'.join('  '.join(line).rstrip() for line in padded)


def rows_table(rows: Sequence[Row]) -> str:
    """Show rows on a terminal."""
    head = ['case', 'median ms', 'min ms', 'images/s', 'ms/MP', 'GMACs', 'GFLOP/s', 'share of GEMM', 'peak MiB',
            'MiB/MP']
    body = []
    for row in rows:
        line = [describe(row), *[''] * 9]
        if row.get('peak_mib'):
            line[8:] = [row['peak_mib'], f'{float(row["peak_mib"]) / megapixels(row):.0f}']
        if row.get('median_ms'):
            median = float(row['median_ms'])
            line[1:8] = [
                row['median_ms'], row['min_ms'], f'{1e3 * int(row["batch"]) / median:.1f}',
                f'{median / megapixels(row):.0f}', row['gmacs'], row['gflops'], f'{float(row["gemm_share"]):.1%}',
            ]
        body.append(line)
    return text_table(head, body)


# ---- targets


@dataclass(frozen=True)
class Target:
    """A ratio to reach. `ratios` lists (case in words, what, top, bottom, per) as `Results.ratio` takes them."""

    name: str
    limit: float
    at_least: bool
    ratios: Tuple[Tuple[str, str, Row, Row, str], ...]
    where: Tuple[Tuple[str, str], ...] = ()

    def met(self, value: float) -> bool:
        """Tell whether a value reaches the target."""
        return value >= self.limit if self.at_least else value <= self.limit

    def worst(self, results: Results, threads: int) -> Optional[Tuple[float, str]]:
        """Return the ratio furthest from the target, and its case, None if nothing was measured."""
        measured = []
        for words, what, top, bottom, per in self.ratios:
            value = results.ratio(what, {**top, 'threads': threads}, {**bottom, 'threads': threads}, per)
            if value is not None:
                measured.append((value, words))
        return (min if self.at_least else max)(measured) if measured else None


def size_contestants(fit: bool) -> List[str]:
    """List the variants with every grouping, the default one without the argument."""
    suffix = ' fit_groups=True' if fit else ''
    default = {'crossformer_tiny': 'map', 'crossformer_small': 'map', 'crossformer_pp_small': 'region'}
    return [
        name + ('' if grouping == default[name] else f' lda_grouping={grouping}') + suffix
        for name in default for grouping in LDA_GROUPINGS
    ]


def _faster(ours: str, peer: str, what: str = 'infer', **case: Any) -> Tuple[str, str, Row, Row, str]:
    return ours, what, {'contestant': peer, **case}, {'contestant': ours, **case}, ''


def _sizes_target(fit: bool) -> Tuple:
    sizes = SIZES[1:SIZES.index('800x1344') + 1]
    return tuple(
        (f'{name} at {size}', 'sizes', {'contestant': name, 'size': size}, {'contestant': name, 'size': '224'}, 'mac')
        for name in size_contestants(fit) for size in sizes
    )


_B8 = {'size': '224', 'batch': 8, 'task': 'logits'}
_B1 = {**_B8, 'batch': 1}
_LARGE = {'size': '800x1344', 'batch': 1, 'task': 'features'}
_STEP = {'size': '224', 'batch': 8, 'task': 'train'}
SMALL_TRAINED = 'crossformer_small drop_path_rate=0.2'  # birder's rate
_CUDA = (('device', 'cuda'), ('dtype', 'bf16'))
_GROWTH = ('crossformer_small lda_grouping=region', 'crossformer_small lda_grouping=grid')

TARGETS = (
    Target('inference, 224 B8: crossformer_small faster than birder', 1.2, True, (
        _faster('crossformer_small', BIRDER, **_B8),)),
    Target('inference, 224 B8: crossformer_lucidrains faster than vit-pytorch', 1.6, True, (
        _faster('crossformer_lucidrains', VIT_PYTORCH, **_B8),)),
    Target('inference, 224 B1: crossformer_lucidrains faster than vit-pytorch', 1.5, True, (
        _faster('crossformer_lucidrains', VIT_PYTORCH, **_B1),)),
    *(Target(f'time per MAC over that of swin_tiny, {words}: tiny, small, pp_small', .95, False, tuple(
        (name, 'infer', {'contestant': name, **case}, {'contestant': SWIN, **case}, 'mac') for name in OURS[:3]))
        for words, case in (('224 B8', _B8), ('800x1344 (features)', _LARGE))),
    Target('share of the matrix rate, crossformer_tiny 224 B8', .72, True, (
        ('crossformer_tiny', 'infer', {'contestant': 'crossformer_tiny', **_B8},
         {'contestant': 'crossformer_tiny', **_B8}, 'gemm'),)),
    Target('time per MAC at 256 to 800x1344 over that at 224', 1.2, False, _sizes_target(False)),
    Target('the same with fit_groups', 1.08, False, _sizes_target(True)),
    Target('training step, 224 B8: crossformer_small faster than birder', 1.15, True, (
        _faster(SMALL_TRAINED, BIRDER, 'train', **_STEP),)),
    Target('torch.compile faster than eager, 224 B1 and B8: small', 1., True, tuple(
        (f'batch {batch}', 'compile', *({'contestant': 'crossformer_small', 'batch': batch, 'mode': mode}
                                        for mode in ('eager', 'compile')), '') for batch in (1, 8))),
    Target('peak memory over that of swin_tiny, 800x1344 and 1024: small', 1., False, tuple(
        (f'crossformer_small at {size}', 'memory', {'contestant': 'crossformer_small', 'size': size},
         {'contestant': SWIN, 'size': size}, 'peak') for size in ('800x1344', '1024'))),
    Target('time per pixel at 2048 over that at 512: small, region and grid', 1.05, False, tuple(
        (name, 'sizes', {'contestant': name, 'size': '2048'}, {'contestant': name, 'size': '512'}, 'pixel')
        for name in _GROWTH)),
    Target('peak memory per pixel at 2048 over that at 512: small, region and grid', 1.05, False, tuple(
        (name, 'memory', {'contestant': name, 'size': '2048'}, {'contestant': name, 'size': '512'}, 'peak pixel')
        for name in _GROWTH)),
    Target('peak memory at 2048: map over region, small', 1.5, False, (
        ('crossformer_small', 'memory', {'contestant': 'crossformer_small', 'size': '2048'},
         {'contestant': _GROWTH[0], 'size': '2048'}, 'peak'),)),
    *(Target(f'CUDA bf16, {mode}: time per MAC of swin_tiny over that of crossformer_small', 1.1, True, (
        ('crossformer_small', 'infer', {'contestant': SWIN, 'mode': mode},
         {'contestant': 'crossformer_small', 'mode': mode}, 'mac'),), _CUDA) for mode in ('eager', 'compile')),
    Target('CUDA, bf16 autocast: crossformer_lucidrains faster than vit-pytorch', 2., True, (
        _faster('crossformer_lucidrains', VIT_PYTORCH),), (('device', 'cuda'), ('dtype', 'amp-bf16'))),
)


def targets_table(results: Path, threads: Sequence[int] = (1, 2)) -> Tuple[List[str], List[List[str]]]:
    """Return head and body of the table of targets; an empty cell was not measured."""
    head = ['target', 'limit', *(f'{n} thread{"s" if n > 1 else ""}' for n in threads), 'worst case', 'met']
    body = []
    for target in TARGETS:
        rows = Results(results, **dict(target.where))
        worst = [target.worst(rows, n) for n in threads]
        measured = [value for value in worst if value is not None]
        cases = dict.fromkeys(words for _, words in measured) if len(target.ratios) > 1 else {}
        met = ('yes' if all(target.met(value) for value, _ in measured) else 'no') if measured else 'not measured'
        body.append([
            target.name, f'{"≥" if target.at_least else "≤"} {target.limit:.2f}',
            *(f'{value[0]:.2f}' if value else '' for value in worst), '; '.join(cases), met,
        ])
    return head, body


# ---- commands


@dataclass(frozen=True)
class Plan:
    """Cases of one part. With `turns` 'models' all models and modes take turns, with 'sizes' all sizes of one model."""

    models: Sequence[str]
    sizes: Sequence[str] = ('224',)
    batch: Sequence[int] = (1,)
    task: str = 'logits'
    modes: Sequence[str] = ('eager',)
    threads: Sequence[int] = (1, 2)
    turns: str = 'models'

    def sets(self, dtype: str, device: str) -> List[List[Case]]:
        """Return the cases, in sets that take turns."""
        sets: Dict[Tuple, List[Case]] = {}
        for threads in self.threads:
            for size in self.sizes:
                for batch in self.batch:
                    for model in self.models:
                        for mode in self.modes:
                            case = Case(model, self.task, mode, size, batch, dtype, device, threads)
                            key = (threads, model, mode, batch) if self.turns == 'sizes' else (threads, size, batch)
                            sets.setdefault(key, []).append(case)
        return list(sets.values())


_TO_DETECTION = SIZES[:SIZES.index('800x1344') + 1]
_DETECTION = Plan([*OURS[:3], SWIN], ['800x1344'], task='features')
_MEMORY = Plan(['crossformer_small', SWIN], ['800x1344', '1024'], task='features', threads=(2,))
_MEMORY_GROWTH = Plan(['crossformer_small', *_GROWTH], ['512', '2048'], task='features', threads=(2,))

PLANS = {
    'infer': [Plan([*OURS, *PEERS], batch=(1, 8)), _DETECTION],
    'train': [Plan([SMALL_TRAINED, BIRDER, 'crossformer_lucidrains', VIT_PYTORCH, SWIN], batch=(8,), task='train')],
    'sizes': [
        Plan([*size_contestants(False), *size_contestants(True), SWIN], SIZES[:-1], turns='sizes'),
        Plan(['crossformer_small', *_GROWTH, SWIN], ['512', '2048'], turns='sizes'),
    ],
    'memory': [
        replace(_MEMORY, models=[*OURS[:3], SWIN]),
        replace(_MEMORY_GROWTH, models=[*_MEMORY_GROWTH.models, 'crossformer_small fit_groups=True', SWIN]),
    ],
    'compile': [Plan(['crossformer_small', SWIN], batch=(1, 8), modes=('eager', 'compile'), threads=(2,))],
}
QUICK_PLANS = {
    'infer': PLANS['infer'],
    'train': [replace(PLANS['train'][0], models=[SMALL_TRAINED, BIRDER])],
    'sizes': [
        Plan([OURS[0], OURS[1], OURS[2], _GROWTH[0]], _TO_DETECTION, threads=(1,), turns='sizes'),
        Plan([*size_contestants(False), *(f'{name} fit_groups=True' for name in OURS[:3]), SWIN], _TO_DETECTION,
             threads=(2,), turns='sizes'),
        Plan(_GROWTH, ['512', '2048'], threads=(2,), turns='sizes'),
    ],
    'memory': [_MEMORY, _MEMORY_GROWTH],
    'compile': [replace(PLANS['compile'][0], models=['crossformer_small'])],
}


def sets_of(what: str, plans: Sequence[Plan], dtype: str = 'fp32', device: str = 'cpu') -> List[List[Case]]:
    """Return the cases of a part, in sets whose rows are of one run and so can be compared."""
    sets = [cases for plan in plans for cases in plan.sets(dtype, device)]
    if what == 'memory':  # nothing takes turns: each case has a process of its own
        sets = [list(itertools.chain.from_iterable(sets))]
    return sets


def run_part(what: str, args: argparse.Namespace) -> List[Row]:
    """Measure all cases of one part, write them as they come, and return them."""
    plans = (QUICK_PLANS if args.quick else PLANS)[what]
    chosen = {name: getattr(args, name) for name in ('models', 'sizes', 'batch', 'task', 'modes', 'threads')
              if getattr(args, name) is not None}
    if chosen.keys() - {'threads'}:
        plans = plans[:1]
    if args.device == 'cuda':
        chosen.setdefault('threads', (1,))  # of the CPU, which only launches
    sets = sets_of(what, [replace(plan, **chosen) for plan in plans], args.dtype, args.device)
    rows: List[Row] = []
    with tqdm(total=sum(map(len, sets)), unit='case', desc=what, disable=None) as bar:
        for cases in sets:
            if what == 'memory':
                new = []
                for case in cases:
                    bar.set_postfix_str(f'{case.contestant} {case.size}')
                    peak, = measure_memory([case])
                    new.append({**asdict(case), 'peak_mib': peak, **machine(case.device)})
                    bar.update()
            else:
                new = measure(cases, args.seconds, args.rounds, bar.set_postfix_str)
                if what == 'sizes':
                    for row, peak in zip(new, measure_memory(cases), strict=True):
                        row['peak_mib'] = peak
                bar.update(len(cases))
            write_rows(args.results, what, new)
            rows += new
    return rows


def write_variants(folder: Path) -> Path:
    """Count parameters and multiply-adds of every registered variant at its own image size."""
    lines = []
    for name in timm.list_models(module='crossformer'):
        size = timm.get_pretrained_cfg(name).input_size[-1]
        case = Case(name, size=str(size))
        build.cache_clear()  # the large ones need not all stay
        params = sum(p.numel() for p in build_case(case)[0].parameters())
        lines.append({'variant': name, 'size': size, 'params_m': f'{params / 1e6:.4f}',
                      'gmacs': f'{count_macs(case) / 1e9:.4f}'})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'variants.csv'
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(lines)
    return path


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the CSV files')
    parts = parser.add_subparsers(dest='what', required=True, metavar='PART')
    texts = {
        'infer': 'forward pass', 'train': 'forward, backward and optimizer step',
        'sizes': 'image sizes in turn: time and peak memory',
        'memory': 'peak memory, one process per case',
        'compile': 'eager against torch.compile', 'all': 'all parts',
    }
    for what, text in texts.items():
        part = parts.add_parser(what, help=text)
        part.add_argument('--quick', action='store_true', help='only the cases that the READMEs quote')
        part.add_argument('--models', nargs='+', metavar='MODEL', help="such as 'crossformer_small lda_grouping=grid'")
        part.add_argument('--sizes', nargs='+', metavar='SIZE', help='such as 224 or 800x1344')
        part.add_argument('--batch', nargs='+', type=int, metavar='N')
        part.add_argument('--threads', nargs='+', type=int, metavar='N')
        part.add_argument('--task', choices=['logits', 'features', 'train'])
        part.add_argument('--modes', nargs='+', choices=list(MODES))
        part.add_argument('--dtype', choices=list(DTYPES), default='fp32')
        part.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
        part.add_argument('--seconds', type=float, default=6., help='start no further round after this time per set')
        part.add_argument('--rounds', type=int, default=3, help='rounds per set in any case')
        part.add_argument('--compare', type=Path, metavar='FILE', help='exit with 1 if slower than in this CSV file')
        part.add_argument('--tolerance', type=float, default=.1, help='slow-down that --compare accepts')
    parts.add_parser('variants', help='count parameters and multiply-adds of every variant')
    parts.add_parser('targets', help='the targets and what the CSV files say')
    parts.add_parser('memory-of').add_argument('cases', type=json.loads)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code."""
    args = parse(argv)
    if args.what == 'memory-of':
        print(json.dumps([memory_of(Case(**case)) for case in args.cases]))
        return 0
    if args.what == 'targets':
        print(text_table(*targets_table(args.results)))
        return 0
    if args.what == 'variants':
        print(write_variants(args.results))
        return 0
    parts = [args.what] if args.what != 'all' else list(PLANS)
    reference = None if args.compare is None else read_rows(args.compare)
    rows = [row for what in parts for row in run_part(what, args)]
    if args.what == 'all':
        write_variants(args.results)
    print(rows_table(rows))
    complaints = [] if reference is None else compare(rows, reference, args.tolerance)
    print('\n'.join(complaints), file=sys.stderr, end='\n' if complaints else '')
    return 1 if complaints else 0


if __name__ == '__main__':
    sys.exit(main())
