"""Where the time goes: milliseconds by kind of operator, of a CrossFormer beside its peer.

    python benchmarks/operators.py

Cases are those of targets that are hard to meet. Contestants take turns; times are means over rounds of what PyTorch's
profiler counts for an operator without those inside it. Writes results/operators.csv.
"""
import argparse
import collections
import csv
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import bench
import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    'linear layers': ('mm', 'addmm'),
    'attention': (
        'bmm', 'baddbmm', '_softmax', '_softmax_backward_data', '_scaled_dot_product_flash_attention_for_cpu'),
    'convolutions': ('mkldnn_convolution', 'convolution_backward', '_slow_conv2d_forward'),
    'GELU': ('gelu', 'gelu_backward'),
    'norms': ('native_layer_norm', 'native_layer_norm_backward', 'var_mean', 'var', 'mean'),
    'copies': ('copy_', 'cat', 'clone', 'stack', 'index', 'gather', 'index_select', 'fill_', 'zero_'),
}
OTHERS = 'others'  # sums, residuals, biases of attention, optimizer, Python
SETS = [
    [bench.Case(name, task=task, size='224', batch=8, threads=threads) for name in names]
    for task, names in (
        ('logits', ('crossformer_small', bench.BIRDER, 'crossformer_lucidrains', bench.VIT_PYTORCH)),
        ('train', (bench.SMALL_TRAINED, bench.BIRDER)),
    )
    for threads in (1, 2)
] + [[bench.Case(f'crossformer_pp_small lda_grouping={grouping}', task='features', size='800x1344', threads=2)
      for grouping in ('map', 'region')]]


def kind_of(operator: str) -> str:
    """Return which of `KINDS` an operator, 'aten::mm' for instance, belongs to."""
    name = operator.rpartition('::')[2]
    return next((kind for kind, names in KINDS.items() if name in names), OTHERS)


def measure(cases: Sequence[bench.Case], rounds: int) -> List[Dict[str, object]]:
    """Profile cases in turns."""
    torch.set_num_threads(cases[0].threads)
    runs = [bench.prepare(case) for case in cases]
    for run in runs * 2:
        run()
    totals: List[Dict[str, float]] = [collections.defaultdict(float) for _ in cases]
    for _ in range(rounds):
        for run, total in zip(runs, totals, strict=True):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                run()
            for event in profiler.key_averages():
                total[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / rounds
    bench.build.cache_clear()
    rows = []
    for case, total in zip(cases, totals, strict=True):
        row: Dict[str, object] = {
            name: getattr(case, name) for name in ('contestant', 'task', 'size', 'batch', 'threads')}
        row.update({kind: round(total[kind]) for kind in (*KINDS, OTHERS)})
        rows.append(dict(row, total=round(sum(total.values())), **bench.machine('cpu')))
    return rows


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--results', type=Path, default=bench.RESULTS, help='folder of the CSV file')
    args = parser.parse_args(argv)
    rows: List[Dict[str, object]] = []
    for cases in SETS:
        rows += measure(cases, args.rounds)
        print(*(f'{row["contestant"]}: {row["total"]} ms' for row in rows[-len(cases):]), sep='\n', flush=True)
    with open(args.results / 'operators.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == '__main__':
    sys.exit(main())
