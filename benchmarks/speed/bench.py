"""Measure CrossFormer and its peers; each case becomes a row of a CSV file.

    python benchmarks/speed/bench.py all --quick    everything the READMEs quote but training
    python benchmarks/speed/bench.py infer          one part of it; `--help` lists the parts and their options
    python benchmarks/speed/bench.py targets        what the rows in benchmarks/results say about the targets

Contestants take turns (A B C A B C ...), so a slow moment of the machine hits all of them, and a ratio of two of them
is the median over rounds of the ratios within a round. Every round begins with a large matrix product: the rate that
the machine has at that moment.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Sequence

import operators
import pandas as pd
import roofline
import rows
import targets
import timm
import torch
from cases import DTYPES, MODES, PLANS, Case, build, build_case, count_macs
from measuring import Row, measure, measure_memory
from tqdm import tqdm

PARTS = {
    'infer': 'forward pass',
    'train': 'forward, backward and optimizer step',
    'sizes': 'image sizes in turn',
    'memory': 'peak memory, one process per case',
    'compile': 'eager against torch.compile',
    'deploy': 'the runtimes that files are exported for, in fp32 and int8',
}
SHOWN = ['contestant', 'task', 'mode', 'size', 'batch', 'threads', 'median_ms', 'gmacs', 'gemm_share', 'peak_mib']


def run_part(what: str, args: argparse.Namespace) -> List[Row]:
    """Measure all cases of one part, write them as they come, and return them."""
    plans = PLANS[what]
    chosen = {name: getattr(args, name) for name in ('models', 'sizes', 'batch', 'task', 'modes', 'threads')
              if getattr(args, name) is not None}
    if chosen.keys() - {'threads'}:
        plans = plans[:1]
    if args.device == 'cuda':
        chosen.setdefault('threads', (1,))  # of the CPU, which only launches
    sets = [cases for plan in plans for cases in replace(plan, **chosen).sets(args.dtype, args.device)]
    found: List[Row] = []
    with tqdm(total=sum(map(len, sets)), unit='case', desc=what, disable=None) as bar:
        for cases in sets:
            torch._dynamo.reset()  # after another batch or size it would compile for all of them
            if what == 'memory':
                new = []
                for case in cases:
                    bar.set_postfix_str(f'{case.contestant} {case.size}')
                    new.append(measure_memory(case))
                    bar.update()
            else:
                new = measure(cases, args.seconds, args.rounds, bar.set_postfix_str)
                bar.update(len(cases))
            rows.write(args.results, what, new)
            found += new
    return found


def write_variants(folder: Path) -> Path:
    """Count parameters and multiply-adds of every registered variant at its own image size."""
    lines = []
    for name in timm.list_models(module='crossformer'):
        size = timm.get_pretrained_cfg(name).input_size[-1]
        case = Case(name, size=str(size))
        build.cache_clear()  # the large ones need not all stay
        params = sum(p.numel() for p in build_case(case)[0].parameters())
        lines.append([name, size, f'{params / 1e6:.4f}', f'{count_macs(case) / 1e9:.4f}'])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'variants.csv'
    pd.DataFrame(lines, columns=['variant', 'size', 'params_m', 'gmacs']).to_csv(path, index=False)
    return path


def run_all(args: argparse.Namespace) -> None:
    """Measure all that the READMEs quote, and write what each part cost."""
    cost = {}
    for what in [*PARTS, 'operators', 'variants', 'roofline']:
        start = time.perf_counter()
        if what in PARTS:
            hardware = run_part(what, args)[-1]['hardware']
            build.cache_clear()
        else:
            {'operators': operators.write, 'variants': write_variants, 'roofline': roofline.write}[what](args.results)
        cost[what] = time.perf_counter() - start
        print(f'{what}: {cost[what] / 60:.1f} minutes', flush=True)
    options = ' --quick' if args.quick else ''
    lines = [[what, round(seconds), f'all{options}', hardware] for what, seconds in cost.items()]
    pd.DataFrame(lines, columns=['part', 'seconds', 'command', 'hardware']).to_csv(
        args.results / 'cost.csv', index=False)


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=rows.RESULTS, help='folder of the CSV files')
    parts = parser.add_subparsers(dest='what', required=True, metavar='PART')
    for what, text in {**PARTS, 'all': 'all parts, operators, variants and roofline'}.items():
        part = parts.add_parser(what, help=text)
        part.add_argument('--quick', action='store_true', help='fewer rounds: 4 seconds per set instead of 20')
        part.add_argument('--seconds', type=float, help='start no further round after this time per set')
        part.add_argument('--rounds', type=int, default=3, help='rounds per set in any case')
        part.add_argument('--models', nargs='+', metavar='MODEL', help="such as 'crossformer_small lda_grouping=grid'")
        part.add_argument('--sizes', nargs='+', metavar='SIZE', help='such as 224 or 800x1344')
        part.add_argument('--batch', nargs='+', type=int, metavar='N')
        part.add_argument('--threads', nargs='+', type=int, metavar='N')
        part.add_argument('--task', choices=['logits', 'features', 'train'])
        part.add_argument('--modes', nargs='+', choices=MODES)
        part.add_argument('--dtype', choices=list(DTYPES), default='fp32')
        part.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parts.add_parser('variants', help='count parameters and multiply-adds of every variant')
    parts.add_parser('targets', help='the targets and what the CSV files say')
    args = parser.parse_args(argv)
    if 'seconds' in args and args.seconds is None:
        args.seconds = 4. if args.quick else 20.
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code."""
    args = parse(argv)
    if args.what == 'targets':
        print(targets.table(args.results).to_string(index=False))
    elif args.what == 'variants':
        print(write_variants(args.results))
    elif args.what == 'all':
        run_all(args)
    else:
        shown = pd.DataFrame(run_part(args.what, args))
        print(shown[[name for name in SHOWN if name in shown]].to_string(index=False))
    return 0


if __name__ == '__main__':
    sys.exit(main())
