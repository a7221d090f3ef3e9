"""Train networks alike, and compare: same script, data, epochs, image size and, within 5 %, parameters.

    python benchmarks/training/peers.py --data DIR --work DIR --csv FILE --plot FILE --seeds 0 1 2 [-- MORE OF train.py]

Contestants: `peers` are a CrossFormer and networks of other families, `ablations` are CrossFormers that each lack, or
change, one thing. Runs one after the other, each in a folder of its own below --work; the same command goes on after an
interruption.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pandas as pd
import timm
import torch
import train
from torch.utils.flop_counter import FlopCounterMode

# Dims are chosen for equal parameters with 10 classes; patches of 4 pixels, as in CrossFormer.
_PEERS: Dict[str, Dict[str, Any]] = {
    'CrossFormer': dict(model='test_crossformer'),
    'Swin': dict(
        model='swin_tiny_patch4_window7_224', patch_size=4, window_size=4, embed_dim=32, depths=[2, 4, 2],
        num_heads=[1, 2, 4], mlp_ratio=3.5),
    'ConvNeXt': dict(model='convnext_tiny', depths=[2, 2, 4, 2], dims=[32, 48, 80, 128]),
    'PVTv2': dict(
        model='pvt_v2_b0', depths=[2, 2, 2, 2], embed_dims=[24, 48, 64, 80], num_heads=[1, 2, 2, 2],
        mlp_ratios=[4, 4, 4, 4]),
    'Hiera': dict(model='hiera_tiny_224', stages=[2, 2, 4, 1], embed_dim=20),
    'ViT': dict(model='vit_tiny_patch16_224', patch_size=4, embed_dim=96, depth=6, num_heads=3, mlp_ratio=3.5),
}
# Groups of 2 x 2 tokens, so that the three groupings differ on the 8 x 8 tokens that an image of 32 px has at first.
_SMALL_GROUPS = dict(model='test_crossformer', group_size=2, interval=[2, 2, 1, 1])
_ABLATIONS: Dict[str, Dict[str, Any]] = {
    'map (the base of the next two)': dict(_SMALL_GROUPS, lda_grouping='map'),
    'without position bias': dict(_SMALL_GROUPS, lda_grouping='map', zero='pos_bias'),
    'without LDA: SDA in all blocks': dict(_SMALL_GROUPS, lda_grouping='region', interval=1),
    'region': dict(_SMALL_GROUPS, lda_grouping='region'),
    'grid': dict(_SMALL_GROUPS, lda_grouping='grid'),
}
CONTESTANTS = {'peers': _PEERS, 'ablations': _ABLATIONS}
SIZED = ('Swin', 'ViT', 'Hiera')  # their constructors need the image size
TOLERANCE = 0.05


def arguments_of(name: str, img_size: int) -> Tuple[str, Optional[str], Dict[str, Any]]:
    """Return timm's name of a contestant, which parameters stay at zero, and its constructor arguments."""
    kwargs = dict({**_PEERS, **_ABLATIONS}[name])
    model, zero = kwargs.pop('model'), kwargs.pop('zero', None)
    return model, zero, dict(kwargs, img_size=img_size) if name in SIZED else kwargs


def count(name: str, img_size: int, num_classes: int) -> Dict[str, int]:
    """Return the parameters and the multiply-adds of one image."""
    model_name, _, kwargs = arguments_of(name, img_size)
    model = timm.create_model(model_name, num_classes=num_classes, **kwargs).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, img_size, img_size))
    return dict(parameters=sum(p.numel() for p in model.parameters()), macs=counter.get_total_flops() // 2)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--contestants', choices=CONTESTANTS, default='peers')
    parser.add_argument('--data', required=True)
    parser.add_argument('--work', required=True, help='folder of the runs')
    parser.add_argument('--csv', required=True, help='file to write, one row per run')
    parser.add_argument('--plot', help='SVG file to write, accuracy over epochs')
    parser.add_argument('--img-size', type=int, default=32)
    parser.add_argument('--num-classes', type=int, default=10)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--dataset-name', default='CIFAR-10 (JPEG q75)', help='what to call the data')
    parser.add_argument('more', nargs='*', help='arguments of train.py, after --')
    args = parser.parse_args(argv)

    names = list(CONTESTANTS[args.contestants])
    counts = {name: count(name, args.img_size, args.num_classes) for name in names}
    wanted = counts[names[0]]['parameters']
    for name, numbers in counts.items():
        if abs(numbers['parameters'] / wanted - 1) > TOLERANCE:
            raise ValueError(
                f'Contestants need equal parameters within {TOLERANCE:.0%}, got {numbers["parameters"]} for {name} and '
                f'{wanted} for {names[0]}. Change its dims.')

    rows: List[Dict[str, Any]] = []
    logs: List[pd.DataFrame] = []
    for seed in args.seeds:
        for number, name in enumerate(names):
            folder = Path(args.work) / f'{args.contestants}-{number}-{seed}'
            model, zero, kwargs = arguments_of(name, args.img_size)
            run = train.parse_args([
                model, '--data', args.data, '--output', str(folder), '--img-size', str(args.img_size), '--num-classes',
                str(args.num_classes), '--seed', str(seed), '--recipe', 'small', *args.more])
            run.model_kwargs, run.zero = kwargs, zero
            print(f'{name}, seed {seed}', flush=True)
            last = train.train(run)
            logs.append(pd.read_csv(folder / 'log.csv').assign(name=name))
            rows.append(dict(
                model=name, parameters=counts[name]['parameters'], mmacs=round(counts[name]['macs'] / 1e6, 2),
                data=args.dataset_name, train_images=run.train_limit or 'all', epochs=run.epochs,
                img_size=args.img_size, seed=seed, accuracy=last['accuracy'],
                cpu_seconds_per_epoch=round(last['cpu_seconds'] / run.epochs, 1),
            ))
            pd.DataFrame(rows).to_csv(args.csv, index=False)
    if args.plot:
        plot(pd.concat(logs), args.plot,
             f'{args.dataset_name}, {wanted / 1e6:.2f} M parameters within {TOLERANCE:.0%}')
    return 0


def plot(log: pd.DataFrame, path: str, title: str) -> None:
    """Draw the accuracy over epochs, the mean over seeds."""
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot

    matplotlib.rcParams.update({'svg.hashsalt': 'peers', 'svg.fonttype': 'none'})
    figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
    means = log.dropna(subset='accuracy').pivot_table('accuracy', 'epoch', 'name', sort=False)
    for name in means:
        axes.plot(means[name], marker='.', label=name)
    axes.set(xlabel='epoch', ylabel='top-1 accuracy, %', title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={'Date': None})
    pyplot.close(figure)


if __name__ == '__main__':
    sys.exit(main())
