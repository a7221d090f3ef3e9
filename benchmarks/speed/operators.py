"""Where the time goes: milliseconds by kind of operator, of a CrossFormer beside its peer.

    python benchmarks/speed/operators.py

Contestants take turns; times are means over rounds of what PyTorch's profiler counts for an operator without those
inside it. Writes results/operators.csv.
"""
import collections
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pandas as pd
import torch
from cases import BIRDER, LUCIDRAINS, PP_SMALL, SMALL, SMALL_TRAINED, VIT_PYTORCH, Case, build, prepare
from measuring import machine
from rows import RESULTS
from torch.profiler import ProfilerActivity, profile

KINDS = {
    'linear layers': ('mm', 'addmm'),
    'attention': (
        'bmm', 'baddbmm', '_softmax', '_softmax_backward_data', '_scaled_dot_product_flash_attention_for_cpu',
        '_scaled_dot_product_flash_attention_for_cpu_backward', '_scaled_dot_product_efficient_attention'),
    'convolutions': ('mkldnn_convolution', 'convolution', 'convolution_backward', '_slow_conv2d_forward'),
    'GELU': ('gelu', 'gelu_backward'),
    'norms': ('native_layer_norm', 'native_layer_norm_backward', 'var_mean', 'var', 'mean'),
    'copies': ('copy_', 'cat', 'clone', 'stack', 'index', 'gather', 'index_select', 'fill_', 'zero_', '_to_copy',
               'constant_pad_nd', 'roll'),
}
OTHERS = 'others'  # sums, residuals, optimizer, Python
SETS = [
    [Case(name, task, batch=8, threads=threads) for name in names]
    for task, names in (
        ('logits', (SMALL, BIRDER, LUCIDRAINS, VIT_PYTORCH)),
        ('train', (SMALL_TRAINED, BIRDER)),
    )
    for threads in (1, 2)
] + [[Case(f'{PP_SMALL} lda_grouping={grouping}', 'features', size='800x1344', threads=2)
      for grouping in ('map', 'region')]]


def kind_of(operator: str, around: Sequence[str] = ()) -> str:
    """Return the kind of an operator, 'aten::mm' for instance, given those that called it.

    Products and all else inside the operator of attention are attention; what it copies counts as copies, as elsewhere.
    """
    name = operator.rpartition('::')[2].partition('.')[0]
    kind = next((kind for kind, names in KINDS.items() if name in names), OTHERS)
    inside = any('grouped_attention' in name for name in (operator, *around))
    return 'attention' if inside and kind != 'copies' else kind


def measure(cases: Sequence[Case], rounds: int) -> List[Dict[str, Any]]:
    """Profile cases in turns."""
    torch.set_num_threads(cases[0].threads)
    runs = [prepare(case) for case in cases]
    for run in runs * 2:
        run()
    totals: List[Dict[str, float]] = [collections.defaultdict(float) for _ in cases]
    for _ in range(rounds):
        for run, total in zip(runs, totals, strict=True):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                run()
            for event in profiler.events():
                around, parent = [], event.cpu_parent
                while parent is not None:
                    around.append(parent.name)
                    parent = parent.cpu_parent
                total[kind_of(event.name, around)] += event.self_cpu_time_total / 1e3 / rounds
    build.cache_clear()
    lines = []
    for case, total in zip(cases, totals, strict=True):
        about = {name: getattr(case, name) for name in ('contestant', 'task', 'size', 'batch', 'threads')}
        kinds = {kind: round(total[kind]) for kind in (*KINDS, OTHERS)}
        lines.append({**about, **kinds, 'total': round(sum(total.values())), **machine('cpu')})
    return lines


def write(folder: Path = RESULTS, rounds: int = 5) -> None:
    """Profile all cases and write their rows."""
    lines = [line for cases in SETS for line in measure(cases, rounds)]
    pd.DataFrame(lines).to_csv(folder / 'operators.csv', index=False)


if __name__ == '__main__':
    sys.exit(write())
