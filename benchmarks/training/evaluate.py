"""Measure the accuracy of a classifier on a parquet file of images, at one size or several, without training.

    python benchmarks/training/evaluate.py test_crossformer.cifar10 --data DIR
    python benchmarks/training/evaluate.py test_crossformer.cifar10 --data DIR --img-size 24 32 48 64 --groupings
    python benchmarks/training/evaluate.py test_crossformer.cifar10 --data DIR --file fp32.onnx int8.onnx

The model's own pre-processing is used, but for the image size. With --groupings every size is measured with each
long-distance grouping, with and without `fit_groups`. Rows go to --csv; a plot over sizes to --plot.
"""
import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pyarrow.parquet
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_crossformer  # registers the models
from timm_crossformer.export import load_exported
from timm_crossformer.ops.grouping import LDA_GROUPINGS

BATCH = 250


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', help='timm model name, with the tag of its weights')
    parser.add_argument('--data', required=True, help='folder of parquet files with columns image and label')
    parser.add_argument('--file', nargs='+', help='exported files of the model, with an open batch, to run instead')
    parser.add_argument('--split', default='test')
    parser.add_argument('--dataset-name', default='CIFAR-10 (JPEG q75)', help='what to call the data in the CSV')
    parser.add_argument('--img-size', type=int, nargs='+', help="default: the model's own")
    parser.add_argument('--groupings', action='store_true', help='all of them, with and without fit_groups')
    parser.add_argument('--limit', type=int, help='the first so many images')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--csv', help='file to write')
    parser.add_argument('--plot', help='SVG file to write, accuracy over size')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    model = timm.create_model(args.model, pretrained=True).eval()
    config = resolve_model_data_config(model)
    table = pyarrow.parquet.read_table(Path(args.data) / f'{args.split}.parquet', columns=['image', 'label'])
    table = table.slice(0, args.limit or len(table))
    images = [Image.open(io.BytesIO(row['bytes'])).convert('RGB') for row in table['image'].to_pylist()]
    labels = torch.tensor(table['label'].to_pylist())

    rows: List[Dict[str, Any]] = []
    for size in args.img_size or [config['input_size'][-1]]:
        transform = create_transform(**dict(config, input_size=(3, size, size)))
        batch = torch.stack([transform(image) for image in images])
        for grouping, fit in settings(model, args.groupings):
            if grouping:
                model.set_input_size(size, lda_grouping=grouping, fit_groups=fit)
            row: Dict[str, Any] = dict(model=args.model, data=args.dataset_name, split=args.split, img_size=size)
            if grouping:
                row.update(lda_grouping=grouping, fit_groups=fit)
            for file in args.file or [None]:
                run: Any = model
                found = dict(row)
                if file:
                    found.update(file=Path(file).name)
                    exported = load_exported(file)
                    run = lambda x: exported(x)[0]  # noqa: B023, E731  called before the loop goes on
                found.update(images=len(labels), accuracy=round(accuracy(run, batch, labels), 2))
                rows.append(found)
                print(', '.join(f'{k} {v}' for k, v in found.items()), flush=True)
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, config['input_size'][-1], args.plot)
    return 0


def settings(model: torch.nn.Module, groupings: bool) -> List[Any]:
    """List (lda_grouping, fit_groups) to measure; None for a model as it is."""
    if not groupings:
        return [(None, None)]
    if not isinstance(model, timm_crossformer.CrossFormer):
        raise ValueError(f'`--groupings` needs a CrossFormer, got {type(model).__name__}.')
    return [(grouping, fit) for grouping in LDA_GROUPINGS for fit in (False, True)]


@torch.inference_mode()
def accuracy(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the top-1 accuracy in per cent."""
    correct = sum(
        int((model(images[i:i + BATCH]).argmax(1) == labels[i:i + BATCH]).sum()) for i in range(0, len(labels), BATCH))
    return 100 * correct / len(labels)


def plot(rows: List[Dict[str, Any]], trained_at: int, path: str) -> None:
    """Draw accuracy over image size, one line per grouping."""
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot

    matplotlib.rcParams.update({'svg.hashsalt': 'evaluate', 'svg.fonttype': 'none'})
    figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
    marks = dict(zip(LDA_GROUPINGS, 'os^', strict=True))
    for grouping, fit in dict.fromkeys((row.get('lda_grouping', ''), row.get('fit_groups', False)) for row in rows):
        line = [row for row in rows if (row.get('lda_grouping', ''), row.get('fit_groups', False)) == (grouping, fit)]
        axes.plot(
            [row['img_size'] for row in line], [row['accuracy'] for row in line], marker=marks.get(grouping, 'o'),
            linestyle='--' if fit else '-', alpha=0.8, label=f'{grouping}{", fit_groups" if fit else ""}' or None)
    axes.axvline(trained_at, color='grey', linestyle=':', label=f'trained at {trained_at} px')
    axes.set(xlabel='image size, px', ylabel='top-1 accuracy, %', title=f'{rows[0]["model"]} on {rows[0]["data"]}')
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Date': None})
    pyplot.close(figure)


if __name__ == '__main__':
    sys.exit(main())
