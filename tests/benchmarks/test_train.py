"""benchmarks/training/train.py: it learns, and an interrupted run ends like an uninterrupted one."""
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import peers
import pytest
import records
import samples
import torch
import train
from PIL import Image
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
SCRIPT = BENCHMARKS / 'training' / 'train.py'
SHORT = [
    'test_crossformer', '--epochs', '2', '--batch-size', '8', '--warmup-epochs', '1', '--threads', '1',
    '--device', 'cpu', '--drop-path', '0.1',
]

# timm's image folders leave it to the garbage collector to close files
pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two classes of 16 x 16 pixels: noise with more red, or with more blue."""
    root = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    for split, count in (('train', 24), ('validation', 8)):
        for label, name in enumerate(('red', 'blue')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(128, 40, (16, 16, 3)) + (20 if label else -20) * np.array([-1, 0, 1])
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return root


def arguments(data, output, *more):
    return [*SHORT, '--data', str(data), '--output', str(output), *more]


def rows_of(folder):
    with open(folder / 'log.csv', newline='') as file:
        return [{k: v for k, v in row.items() if 'seconds' not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize('options', [
    ['--img-size', '16'],
    ['--img-size', '24', '--train-sizes', '16,24', '--augment', 'timm', '--mixup', '0.8', '--cutmix', '1.0',
     '--mixup-off-epoch', '1', '--auto-augment', 'rand-m9-mstd0.5-inc1', '--random-erasing', '0.25',
     '--layer-decay', '0.9'],
], ids=['batch', 'timm'])
def test_killed_run_ends_like_an_uninterrupted_one(data, tmp_path, options):
    train.main(arguments(data, tmp_path / 'whole', *options))

    killed = arguments(data, tmp_path / 'killed', *options, '--checkpoint-steps', '2')
    process = subprocess.Popen([sys.executable, str(SCRIPT), *killed])
    checkpoint = tmp_path / 'killed' / 'checkpoint.pt'
    deadline = time.monotonic() + 600  # the start alone takes a minute where many want the cores
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'The run ended before it was killed.'
    steps = torch.load(checkpoint, weights_only=True)['step']
    assert steps < 12
    train.main(killed)

    assert rows_of(tmp_path / 'killed') == rows_of(tmp_path / 'whole')
    whole, resumed = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'killed'))
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), f'{key} differs after resuming from step {steps}.'


def test_loss_falls_and_the_files_are_there(data, tmp_path):
    summary = tmp_path / 'summary.csv'
    for _ in range(2):  # the second run has nothing left to do
        last = train.train(train.parse_args(arguments(
            data, tmp_path, '--epochs', '6', '--img-size', '16', '--summary', str(summary))))
    losses = [float(row['train_loss']) for row in rows_of(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    assert last['accuracy'] > 90
    assert json.loads((tmp_path / 'config.json').read_text())['settings']['train_images'] == 48
    assert (tmp_path / 'plot.svg').read_text().startswith('<?xml')
    with open(summary, newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['lr'], float(row['accuracy'])) for row in rows] == 2 * [('0.002', last['accuracy'])]


def test_imagenet_recipe_is_the_official_one():
    args = train.parse_args(['crossformer_base', '--data', 'x', '--output', 'y', '--recipe', 'imagenet'])
    official = dict(
        epochs=300, warmup_epochs=20, batch_size=1024, opt='adamw', lr=5e-4, warmup_lr=5e-7, min_lr=5e-6,
        weight_decay=0.05, clip_grad=5., smoothing=0.1, mixup=0.8, cutmix=1., auto_augment='rand-m9-mstd0.5-inc1',
        color_jitter=0.4, random_erasing=0.25, drop_path=0.3, ema_decay=0., img_size=224,
    )
    assert {name: getattr(args, name) for name in official} == official


def test_stopped_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pt'
    records.save_atomically({'step': 1}, path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, 'fsync', stop)
    with pytest.raises(KeyboardInterrupt):
        records.save_atomically({'step': 2}, path)
    assert torch.load(path, weights_only=True) == {'step': 1}


def test_resuming_with_other_arguments_is_refused(data, tmp_path):
    train.main(arguments(data, tmp_path, '--img-size', '16', '--epochs', '1'))
    with pytest.raises(ValueError, match='other values of epochs, lr'):
        train.main(arguments(data, tmp_path, '--img-size', '16', '--lr', '1', '--epochs', '3'))


def test_ranks_share_each_batch():
    whole = list(samples.Batches(torch.arange(20), 6, 1, 0, 0, 0, 1))
    halves = [list(samples.Batches(torch.arange(20), 6, 1, 0, 0, rank, 2)) for rank in range(2)]
    assert len(whole) == 3
    for batch, first, second in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(first + second)
    assert list(samples.Batches(torch.arange(20), 6, 1, 2, 0, 0, 1)) == whole[2:]


def test_validation_on_the_training_split_takes_other_images(data, tmp_path):
    first, last = samples.random_subset(20, 12), samples.random_subset(20, 8, last=True)
    assert sorted([*first.tolist(), *last.tolist()]) == list(range(20))
    split = ['--val-split', 'train', '--img-size', '16', '--epochs', '1', '--train-limit', '40', '--val-limit']
    train.main(arguments(data, tmp_path, *split, '8'))
    with pytest.raises(ValueError, match="different images, got 40 and 9 of the 48 in 'train'"):
        train.main(arguments(data, tmp_path, *split, '9'))


@pytest.mark.slow
@pytest.mark.parametrize('what, shown', [('peers', 'Hiera'), ('ablations', 'without position bias')])
def test_contestants_are_equally_large_and_end_in_a_table(data, tmp_path, what, shown):
    names = list(peers.CONTESTANTS[what])
    assert len(names) == len({str(peers.arguments_of(name, 32)) for name in names})
    peers.main([
        '--contestants', what, '--data', str(data), '--work', str(tmp_path / 'work'), '--csv',
        str(tmp_path / 'out.csv'), '--plot', str(tmp_path / 'out.svg'), '--num-classes', '2', '--', '--epochs', '1',
        '--batch-size', '16', '--threads', '1'])
    rows = pd.read_csv(tmp_path / 'out.csv')
    assert list(rows['model']) == names
    assert shown in (tmp_path / 'out.svg').read_text()


def test_contestants_of_other_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(peers, 'TOLERANCE', 1e-3)
    with pytest.raises(ValueError, match='Contestants need equal parameters within 0%, got 615868 for Swin and 633352'):
        peers.main(['--data', '', '--work', '', '--csv', ''])


def test_parameters_kept_at_zero_stay_there(data, tmp_path):
    train.train(train.parse_args(arguments(
        data, tmp_path, '--img-size', '16', '--zero', 'blocks.1.attn.pos_bias')))
    weights = load_file(tmp_path / 'model.safetensors')
    nonzero = {key.split('.attn.')[0] for key, value in weights.items() if 'pos_bias.mlp' in key and value.any()}
    assert {key.rsplit('.', 1)[-1] for key in nonzero} == {'0', '2', '3'}
    with pytest.raises(ValueError, match="`--zero` needs a part of the name of a parameter, got 'posbias'"):
        train.train(train.parse_args(arguments(data, tmp_path / 'other', '--zero', 'posbias')))


@pytest.mark.slow
def test_torchrun(data, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(SCRIPT)]
    subprocess.run([*command, *arguments(data, tmp_path, '--img-size', '16')], check=True, timeout=300)
    assert len(rows_of(tmp_path)) == 2
    assert float(rows_of(tmp_path)[-1]['train_loss']) < float(rows_of(tmp_path)[0]['train_loss'])


def test_bundled_weights_are_those_that_were_measured():
    from timm_crossformer.checkpoints.files import hash_file
    from timm_crossformer.checkpoints.records import manifest, weights_dir

    record = next(record for record in manifest() if record.tag == 'test_crossformer.cifar10')
    weights, (source,) = weights_dir() / record.bundled, record.sources
    assert (source.size, source.sha256) == (weights.stat().st_size, hash_file(weights))
    assert source.size < 4e6
    results = BENCHMARKS / 'results' / 'train' / 'test_crossformer.cifar10'
    with open(results / 'accuracy.csv', newline='') as file:
        row, = csv.DictReader(file)
    metric, = record.metrics
    assert metric['value'] == float(row['accuracy'])
    assert metric['dataset'].startswith(row['data'])
    assert row['images'] == '10000'
    assert metric['value'] == pytest.approx(float(rows_of(results)[-1]['accuracy']), abs=.1)  # there in 32 bits
