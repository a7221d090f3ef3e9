"""What a training run writes: checkpoint, log, plot, settings, and its row of a summary."""
import csv
import json
import os
import platform
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch

import timm_crossformer

# Columns of --summary.
SUMMARY = (
    'model', 'train_images', 'train_sizes', 'img_size', 'epochs', 'batch_size', 'opt', 'lr', 'warmup_epochs',
    'weight_decay', 'clip_grad', 'smoothing', 'mixup', 'cutmix', 'mixup_prob', 'drop_path', 'ema_decay', 'amp', 'seed',
    'train_loss', 'val_loss', 'accuracy', 'cpu_seconds',
)


def save_atomically(state: Dict[str, Any], path: Path) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_log(rows: List[Dict[str, Any]], folder: Path, title: str) -> None:
    """Write log.csv and plot.svg."""
    with open(folder / 'log.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot

    matplotlib.rcParams['svg.hashsalt'] = 'train'
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    epochs = [row['epoch'] for row in rows]
    measured = [row for row in rows if row['accuracy'] != '']
    left.plot(epochs, [row['train_loss'] for row in rows], label='training (augmented, smoothed)')
    left.plot([row['epoch'] for row in measured], [row['val_loss'] for row in measured], label='validation')
    left.set(xlabel='epoch', ylabel='loss')
    left.legend(frameon=False)
    right.plot([row['epoch'] for row in measured], [row['accuracy'] for row in measured], marker='.')
    right.set(xlabel='epoch', ylabel='top-1 accuracy on validation, %')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title)
    figure.savefig(folder / 'plot.svg', metadata={'Date': None})
    pyplot.close(figure)


def add_row(path: Path, row: Dict[str, Any]) -> None:
    """Add the columns `SUMMARY` of a row to a CSV file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, SUMMARY, extrasaction='ignore', lineterminator='\n')
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def describe_run(folder: Path, settings: Dict[str, Any]) -> None:
    """Write config.json: settings, versions and hardware."""
    cpu = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        cpu = next((line.split(': ')[1] for line in info.read_text().splitlines() if 'model name' in line), cpu)
    hardware = torch.cuda.get_device_name() if settings['device'] == 'cuda' else f'{cpu}, {settings["threads"]} threads'
    record = dict(
        settings=settings, hardware=hardware, torch=torch.__version__, timm=timm.__version__,
        timm_crossformer=timm_crossformer.__version__)
    (folder / 'config.json').write_text(json.dumps(record, indent=1, default=str) + '\n')
