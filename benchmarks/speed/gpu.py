"""A verdict on the card at hand, in nine minutes: is it right, how near to the card's bandwidth, how fast are models?

    python benchmarks/speed/gpu.py [operator] [models] [--out FOLDER] [--minutes 9]
    python benchmarks/speed/gpu.py --dry     the whole course on a CPU, with tiny shapes: does the script run?

Needs PyTorch with Triton, timm and einops, no network; vit-pytorch is measured where it is installed. Wheels that a
machine lacks can be brought along: `pip download --no-deps timm einops vit-pytorch`. Every row is written the moment it
is measured, with the name of the card; what takes longer than its share of time is stopped and written as such. Ends
with the targets that are met, and those that are not.
"""
import argparse
import csv
import itertools
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from cases import CONVNEXT, DTYPES, LUCIDRAINS, PP_SMALL, SMALL, SWIN, TINY, VIT_PYTORCH, Case, build, prepare
from torch import Tensor

from timm_crossformer.ops import cpu, reference, triton
from timm_crossformer.ops.grouping import axis_segments, group_view, map_layout

COLUMNS = ['part', 'item', 'value', 'unit', 'estimate', 'measured_to_estimate', 'target', 'met', 'note', 'seconds',
           'card', 'torch', 'triton']
PARTS = ('operator', 'models')
ROOFLINE = Path(__file__).parents[1] / 'results' / 'roofline.csv'
STAGES = {  # heads of 32 channels, group, interval, grouping of LDA
    SMALL: [(3, 7, 8, 'map'), (6, 7, 4, 'map'), (12, 7, 2, 'map'), (24, 7, 1, 'map')],
    PP_SMALL: [(2, 4, 4, 'region'), (4, 4, 2, 'region'), (8, 14, 1, 'region'), (16, 7, 1, 'region')],
}
MOST_ERROR = {'bf16': 1e-2, 'fp16': 2e-3, 'fp32': 2e-5}  # of the norm, against fp64
LEAST_SHARE = {'forward': 0.5, 'backward': 0.4}  # of the bandwidth that a copy reaches, of groups of one tile
Shape = Tuple[str, int, int, int, int, Any, Any]  # name, heads, batch, H, W, rows, cols


class OutOfTime(Exception):
    """An item took longer than its share."""


class Verdict:
    """Rows of a run, written as they come."""

    def __init__(self, path: Path, device: torch.device, minutes: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.device, self.end = path, device, time.monotonic() + 60 * minutes
        self.card = 'dry' if device.type == 'cpu' else torch.cuda.get_device_name()
        self.rows: List[Dict[str, Any]] = []

    def measure(self, part: str, item: str, run: Callable[[], Tuple[float, str]], seconds: float, **about: Any) -> None:
        """Write a row with what `run` returns, a value and its unit, or with the reason why there is none."""
        start = time.monotonic()
        row = {'part': part, 'item': item, **about}
        try:
            with limit(min(seconds, self.end - start)):
                row['value'], row['unit'] = run()
        except Exception as error:  # the other items are still worth measuring
            row['note'] = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
        row['seconds'] = round(time.monotonic() - start, 1)
        value, estimate, target = (row.get(name) for name in ('value', 'estimate', 'target'))
        if value is not None and estimate:
            row['measured_to_estimate'] = value / estimate
        if target is not None:
            sign, bound = target.split()
            row['met'] = value is not None and (value <= float(bound) if sign == '<=' else value >= float(bound))
        row.update(card=self.card, torch=torch.__version__, triton=getattr(triton.kernels.triton, '__version__', ''))
        self.rows.append(row)
        new = not self.path.exists()
        with self.path.open('a', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print('  '.join(f'{row[name]:.4g}' if isinstance(row[name], float) else str(row[name])
                        for name in COLUMNS[1:10] if row.get(name) is not None), flush=True)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what takes longer."""
    def stop(*_: Any) -> None:
        raise OutOfTime(f'stopped after {seconds:.0f} s')

    if seconds <= 0:
        raise OutOfTime('no time was left')
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def milliseconds(run: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """Return the median time of a call, after one that is not counted."""
    times: List[float] = []
    run()
    end = time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
        if device.type == 'cuda':
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def shapes(size: Tuple[int, int], batch: int) -> Iterator[Shape]:
    """List the attention of every stage of the variants at an image size."""
    for model, stages in STAGES.items():
        for i, (heads, group, interval, grouping) in enumerate(stages):
            H, W = (-(-side // (4 << i)) for side in size)
            for kind in ('sda', grouping):
                name = f'{model} stage {i + 1} {kind} {size[0]}x{size[1]} batch {batch}'
                yield (name, heads, batch, H, W, *map_layout(H, W, (group, group), interval, kind))


def inputs(shape: Shape, dtype: str, device: torch.device) -> Tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values; a table; a gradient."""
    _, heads, batch, H, W, rows, cols = shape
    generator = torch.Generator(device).manual_seed(0)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    qkv, grad = noise(batch, H, W, 96 * heads), noise(batch, H, W, 32 * heads)
    return qkv.to(DTYPES[dtype]), noise(heads, 2 * rows[1] - 1, 2 * cols[1] - 1), grad.to(DTYPES[dtype])


def passes(shape: Shape, dtype: str, device: torch.device) -> Tuple[Callable[[], Any], Callable[[], Any], Any]:
    """Return the forward pass without gradients, the backward pass, and what they compute."""
    qkv, table, grad = inputs(shape, dtype, device)
    given = shape[1], *shape[5:]
    if device.type == 'cpu':
        return (lambda: cpu.forward(qkv, table, *given)), (lambda: cpu.backward(grad, qkv, table, *given)), (
            cpu.forward(qkv, table, *given), *cpu.backward(grad, qkv, table, *given))
    out, logsumexp = triton.forward(qkv, table, *given, save=True)
    back = (grad, qkv, table, out, logsumexp, *given)
    return (lambda: triton.forward(qkv, table, *given)), (lambda: triton.backward(*back)), (
        out, *triton.backward(*back))


def error_of(shape: Shape, dtype: str, device: torch.device) -> float:
    """Return the largest error of result and gradients against fp64, relative to their norms."""
    qkv, table, grad = inputs(shape, dtype, device)
    _, _, found = passes(shape, dtype, device)
    leaves = [qkv.double().requires_grad_(), table.double().requires_grad_()]
    out = reference.grouped_attention(*leaves, shape[1], *shape[5:])
    expected = out.detach(), *torch.autograd.grad(out, leaves, grad.double())
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float('nan')


def windows(shape: Shape, dtype: str, device: torch.device) -> Callable[[], Any]:
    """Return what timm's Swin would do: gather, PyTorch's fused attention with a bias, scatter."""
    qkv, table, grad = inputs(shape, dtype, device)
    row, col = axis_segments(shape[3], shape[5])[0], axis_segments(shape[4], shape[6])[0]

    def run() -> Tensor:
        q, k, v = cpu.split_heads(group_view(qkv, row, col), 3, shape[1]).unbind(0)
        bias = cpu.expand_bias(table, row[2], col[2]).to(qkv.dtype)[None]
        out = torch.empty_like(grad)
        cpu.write_heads(group_view(out, row, col), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        return out

    return run


def bandwidth_of(device: torch.device, size: int) -> float:
    """Return the bytes that a copy of so many bytes reads and writes in a millisecond."""
    block = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    return 2 * size / milliseconds(lambda: other.copy_(block), device)


def operator_part(verdict: Verdict, dry: bool) -> None:
    """Errors at the shapes of the variants; times beside the floor that bandwidth sets, and beside PyTorch's own."""
    device = verdict.device
    sizes = [((64, 64), 1)] if dry else [((224, 224), 2), ((160, 250), 1)]
    for (size, batch), dtype in itertools.product(sizes, ('bf16', 'fp16', 'fp32')):
        for shape in shapes(size, batch):
            verdict.measure(
                'operator', f'error {shape[0]} {dtype}', lambda s=shape, d=dtype: (error_of(s, d, device), 'of norm'),
                30, target=f'<= {MOST_ERROR[dtype]}')
    bandwidth = bandwidth_of(device, 1 << (20 if dry else 30))
    verdict.measure('operator', 'bandwidth of a copy', lambda: (bandwidth / 1e6, 'GB/s'), 1)
    sizes = [((64, 64), 1)] if dry else [((224, 224), 128), ((800, 1344), 1)]
    for (size, batch), dtype in itertools.product(sizes, ('bf16', 'fp32')):
        for shape in shapes(size, batch):
            one_tile = shape[5][1] * shape[6][1] <= 64
            unit = shape[1] * 32 * shape[2] * shape[3] * shape[4] * DTYPES[dtype].itemsize / bandwidth

            def timed(way: int, shape: Shape = shape, dtype: str = dtype) -> Tuple[float, str]:
                return milliseconds(passes(shape, dtype, device)[way], device, 0.05), 'ms'

            for way, (name, numbers) in enumerate((('forward', 4), ('backward', 7))):
                target = f'<= {numbers * unit / LEAST_SHARE[name]:.6g}' if one_tile and dtype == 'bf16' else None
                verdict.measure(
                    'operator', f'{name} {shape[0]} {dtype}', lambda way=way: timed(way), 20,
                    estimate=numbers * unit, target=target)
            if size != (800, 1344):
                verdict.measure(
                    'operator', f'forward of PyTorch on windows {shape[0]} {dtype}',
                    lambda s=shape, d=dtype: (milliseconds(windows(s, d, device), device, 0.05), 'ms'), 20)


def estimates() -> Dict[Tuple[str, ...], Dict[str, float]]:
    """Read the estimated milliseconds of a model, size, batch and dtype, by card."""
    found: Dict[Tuple[str, ...], Dict[str, float]] = {}
    with ROOFLINE.open(newline='') as file:
        for row in csv.DictReader(file):
            sums = found.setdefault((row['model'], row['size'], row['batch'], row['dtype']), {})
            for card in ('A100', 'H100'):
                sums[card] = sums.get(card, 0.) + float(row[f'{card}_ms_estimate'])
    return found


def models_part(verdict: Verdict, dry: bool) -> None:
    """Milliseconds and memory of models; those that matter most come first."""
    estimated, device = estimates(), verdict.device
    card: Optional[str] = next((name for name in ('A100', 'H100') if name in verdict.card), None)
    names = [SMALL, SWIN, CONVNEXT, TINY, PP_SMALL, LUCIDRAINS, VIT_PYTORCH]
    plan = [('logits', mode, '224', batch, dtype) for mode, batch, dtype in itertools.product(
        ('eager',), (128, 1, 8), ('bf16', 'fp32'))]
    plan += [('train', 'eager', '224', 128, 'amp-bf16'), ('features', 'eager', '800x1344', 1, 'bf16')]
    plan += [('logits', 'compile', '224', batch, 'bf16') for batch in (128, 1)]
    if dry:
        names, plan = ['test_crossformer'], [
            ('logits', 'eager', '64', 2, 'fp32'), ('train', 'eager', '64', 2, 'fp32'),
            ('features', 'eager', '64', 1, 'bf16')]
    for task, mode, size, batch, dtype in plan:
        for name in names if mode == 'eager' else names[:3]:
            case = Case(name, task, mode, size, batch, dtype, device.type)

            def run(case: Case = case) -> Tuple[float, str]:
                build.cache_clear()
                if device.type == 'cuda':
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                return milliseconds(prepare(case), device, 0.1 if dry else 0.5), 'ms'

            item = f'{name} {task} {mode} {size} batch {batch} {dtype}'
            rival = next((row.get('value') for row in verdict.rows if row['item'] == item.replace(name, SWIN)), None)
            estimate = estimated.get((name, size, str(batch), dtype), {}).get(card or '') if task == 'logits' else None
            verdict.measure(
                'models', item, run, 60 if mode == 'compile' else 20, estimate=estimate,
                target=f'<= {rival:.6g}' if rival and name in (TINY, PP_SMALL) and batch == 128 else None)
            if device.type == 'cuda':
                peak = torch.cuda.max_memory_allocated() / 2 ** 20
                verdict.measure('models', f'memory of {item}', lambda peak=peak: (peak, 'MiB'), 1)


def main(args: Optional[Sequence[str]] = None) -> int:
    """Measure; return 1 if a target is not met."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('parts', nargs='*', choices=[*PARTS, []], default=[], help='both if none is named')
    parser.add_argument('--out', type=Path, default=Path('outputs/gpu'))
    parser.add_argument('--minutes', type=float, default=9., help='in all; what is left then is not measured')
    parser.add_argument('--dry', action='store_true', help='on a CPU, tiny')
    given = parser.parse_args(args)
    if not given.dry and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU. Try --dry, or a build of PyTorch for CUDA.')
    device = torch.device('cpu' if given.dry else 'cuda')
    verdict = Verdict(given.out / 'gpu.csv', device, given.minutes)
    for part in given.parts or PARTS:
        {'operator': operator_part, 'models': models_part}[part](verdict, given.dry)
    for met, title in ((True, 'met'), (False, 'not met')):
        rows = [row for row in verdict.rows if row.get('met') is met]
        print(f'\nTargets {title}: {len(rows)}')
        for row in rows if not met else ():
            print(f'  {row["item"]}: {row.get("value", row.get("note"))}, wanted {row["target"]}')
    print(f'Rows: {verdict.path}')
    return int(not given.dry and any(row.get('met') is False for row in verdict.rows))


if __name__ == '__main__':
    sys.exit(main())
