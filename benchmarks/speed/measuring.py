"""Time cases in turn, check what they computed, and measure how much memory they need."""
import ctypes
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import timm
import torch
from cases import DTYPES, FORM, PADS_WINDOWS, Case, build_case, count_macs, prepare, same_networks
from torch import Tensor

GEMM_SIDE = {'cpu': 2048, 'cuda': 8192}
Row = Dict[str, Any]


class WrongResult(Exception):
    """A contestant computed something it should not."""


def measure(
        cases: Sequence[Case],
        seconds: float = 10.,
        min_rounds: int = 3,
        progress: Callable[[str], Any] = lambda line: None,
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
    first = cases[0]
    if any((case.device, case.dtype, case.threads) != (first.device, first.dtype, first.threads) for case in cases):
        raise ValueError('Cases that run in turn need one device, dtype and number of threads.')
    torch.set_num_threads(first.threads)
    for peer, ours in same_networks(cases):
        if not ours.contestant.endswith(FORM):  # which is made of the weights of the other
            build_case(ours)[0].load_state_dict(build_case(peer)[0].state_dict())
    runs, macs = [], []
    for case in cases:
        progress(f'warm-up: {case.contestant} {case.size}')
        macs.append(count_macs(case))
        runs.append(prepare(case))
        # Counting was the warm-up; but not of what counts another case, or runs otherwise when nobody counts.
        if case.mode != 'eager' or case.contestant in PADS_WINDOWS or case.contestant.endswith(FORM):
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
        shares = [mac / gemm_macs * peak / own for own, peak in zip(t, gemm_times, strict=True)]
        rows.append({
            **asdict(case),
            'params_m': round(sum(p.numel() for p in build_case(case)[0].parameters()) / 1e6, 4),
            'gmacs': round(mac / case.batch / 1e9, 4),
            'rounds': len(t),
            'median_ms': round(1e3 * statistics.median(t), 3),
            'min_ms': round(1e3 * min(t), 3),
            'gflops': round(2e-9 * mac / statistics.median(t), 2),
            'gemm_gflops': round(2e-9 * gemm_macs / statistics.median(gemm_times), 2),
            'gemm_share': round(statistics.median(shares), 4),
            'times_ms': ' '.join(f'{1e3 * s:.3f}' for s in t),
            **machine(case.device),
        })
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
        leaves = [output] if isinstance(output, Tensor) else output.values() if isinstance(output, dict) else output
        if not all(torch.isfinite(leaf).all() for leaf in leaves):
            raise WrongResult(f'{case.contestant} at {case.size} px in {case.dtype} returned infinity or NaN.')
    for peer, ours in same_networks(cases):
        expected = outputs[cases.index(peer)].float()
        actual = outputs[cases.index(ours)].float()
        tolerance = 1e-4 if ours.dtype == 'fp32' and ours.device == 'cpu' else 5e-2
        if 'int8' in ours.mode:
            tolerance = .5  # ranges of noise, no trained weights: whether it is this network at all
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not difference <= tolerance:
            raise WrongResult(
                f'{ours.contestant} ({ours.mode}) and {peer.contestant} ({peer.mode}) are the same network and have '
                f'the same weights, but their outputs differ by {difference:.2g} of the largest one, more than '
                f'{tolerance:g}.')


def measure_memory(case: Case) -> Row:
    """Measure the peak memory of a case in a process of its own."""
    done = subprocess.run([sys.executable, __file__, json.dumps(asdict(case))], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise WrongResult(f'{case.contestant} at {case.size} px: the process ended with code {done.returncode}.')
    return {**asdict(case), 'peak_mib': float(done.stdout), **machine(case.device)}


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
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if platform.libc_ver()[0] == 'glibc':  # give back memory that is free but kept
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path('/proc/self/clear_refs').write_text('5')  # what building the model took on the way is forgotten
        before = _status_mib('VmRSS')
        run()
        return _status_mib('VmHWM') - before  # not `ru_maxrss`: it starts at what the parent process used
    except OSError as error:
        raise OSError(f'Peak memory on a CPU needs Linux and its /proc/self/clear_refs, got: {error}') from error


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


if __name__ == '__main__':
    print(round(memory_of(Case(**json.loads(sys.argv[1]))), 2))
