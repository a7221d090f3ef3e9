"""Wheel and source distribution, as users get them: `make package`.

Both are built, the wheel from the source distribution. The wheel goes into an empty environment away from the checkout,
and the quick tests of the source distribution run on it. Needs uv and twine in this environment, and a package index.
PACKAGE_PYTHON is the Python of that environment, by default the one that runs this.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import versions

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name('uv')
PYTHON = os.environ.get('PACKAGE_PYTHON') or sys.executable


def run(*command, cwd, **env):
    """Run a command away from this environment; return stdout."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'VIRTUAL', 'PYTEST'))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dist')
    run(UV, 'build', '-q', '--out-dir', folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope='module')
def wheel(dist):
    (path,) = dist.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def source(dist, tmp_path_factory):
    """Unpack the source distribution."""
    (path,) = dist.glob('*.tar.gz')
    folder = tmp_path_factory.mktemp('source')
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter='data')
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope='module')
def environment(wheel, tmp_path_factory):
    """Return the bin of an environment that holds the wheel and what it asks for, and an empty folder."""
    folder = tmp_path_factory.mktemp('away')
    (folder / 'constraints.txt').write_text('\n'.join(versions.constraints('newest')))
    run(UV, 'venv', '-q', '--python', PYTHON, folder / 'venv', cwd=folder)
    install(folder / 'venv' / 'bin', wheel)
    return folder / 'venv' / 'bin'


def install(bin, what):
    folder = bin.parents[1]
    run(UV, 'pip', 'install', '-q', '--python', bin / 'python', '-c', folder / 'constraints.txt', what, cwd=folder)


def test_descriptions_render(dist):
    out = run(sys.executable, '-m', 'twine', 'check', '--strict', *sorted(dist.glob('timm_crossformer-*')), cwd=dist)
    assert out.count('PASSED') == 2


def test_the_wheel_holds_the_package_and_its_weights_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith('/METADATA'))).decode()
        entry = archive.read(next(name for name in names if name.endswith('/entry_points.txt'))).decode()
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_crossformer').rglob('*.py')}
    weights = {
        f'timm_crossformer/weights/{path.name}'
        for path in (*(ROOT / 'weights').iterdir(), ROOT / 'examples' / 'photo.jpg')}
    manifest = json.loads((ROOT / 'weights' / 'manifest.json').read_text())['weights']
    assert {f'timm_crossformer/weights/{record["bundled"]}' for record in manifest if record['bundled']} <= weights
    info = wheel.name.rpartition('-py3')[0] + '.dist-info/'
    assert names == {
        *tracked, *weights, 'timm_crossformer/py.typed', 'timm_crossformer_cli.py',
        *(info + name for name in (
            'METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'licenses/LICENSE', 'licenses/NOTICE')),
    }
    assert 'timm-crossformer = timm_crossformer_cli:main' in entry
    requires = re.findall(r'^Requires-Dist: (.*)$', metadata, re.MULTILINE)
    assert {r for r in requires if 'extra ==' not in r} == {
        f'{name.replace("_", "-")}>={version}' for name, version in versions.floors().items()}
    assert f'Requires-Python: {versions.read()["project"]["requires-python"]}' in metadata


def test_the_source_distribution_holds_what_is_tracked_and_nothing_else(source):
    if not (ROOT / '.git').exists():
        pytest.skip('no checkout')
    tracked = set(run('git', 'ls-files', '-co', '--exclude-standard', cwd=ROOT).splitlines())
    held = {str(path.relative_to(source)) for path in source.rglob('*') if path.is_file()}
    assert held - tracked == {'PKG-INFO'}
    assert tracked - held <= {'.ci/run', '.gitignore'}


def test_the_command_runs_from_an_empty_environment(environment, wheel):
    folder = environment.parents[1] / 'empty'
    folder.mkdir()
    shutil.copy(ROOT / 'examples' / 'photo.jpg', folder)
    where = run(environment / 'python', '-c', 'import timm_crossformer as t; print(t.__file__)', cwd=folder).strip()
    assert Path(where).is_relative_to(environment.parent) and not Path(where).is_relative_to(ROOT)
    command = environment / 'timm-crossformer'
    assert run(command, '--version', cwd=folder).split()[1] in wheel.name
    assert 'this package' in run(command, 'list', cwd=folder)
    assert run(command, 'classify', 'photo.jpg', cwd=folder).splitlines()[1].split()[-1] == 'cat'
    assert '×75×113  ' in run(command, 'features', 'photo.jpg', '--whole', cwd=folder)
    run(UV, 'pip', 'check', '--python', environment / 'python', cwd=folder)


def test_exported_files_run_where_this_package_is_not_installed(tmp_path):
    """ONNX beside NumPy, Pillow and ONNX Runtime alone; torch.export beside PyTorch, in one that finds nothing else."""
    export = [sys.executable, '-m', 'timm_crossformer', 'export', '--model', 'test_crossformer', '--pretrained']
    for options in (['model.onnx'], ['model.pt2', '--format', 'torch']):
        run(*export, *options, '--size', '64', cwd=tmp_path, PYTHONPATH=str(ROOT))
    for name in ('deploy.py', 'photo.jpg'):
        shutil.copy(ROOT / 'examples' / name, tmp_path)
    run(UV, 'venv', '-q', '--python', PYTHON, tmp_path / 'venv', cwd=tmp_path)
    python = tmp_path / 'venv' / 'bin' / 'python'
    run(UV, 'pip', 'install', '-q', '--python', python, 'numpy', 'pillow', 'onnxruntime', cwd=tmp_path)
    assert run(python, 'deploy.py', 'model.onnx', 'photo.jpg', cwd=tmp_path).split()[1] == 'cat'
    (tmp_path / 'program.py').write_text(
        'import sys; sys.modules.update(timm_crossformer=None, timm=None)\n'
        'import torch; from deploy import json, prepare; from PIL import Image\n'
        'about = json.load(open("model.pt2.json"))\n'
        'x = torch.from_numpy(prepare(Image.open("photo.jpg").convert("RGB"), about["preprocessing"]))\n'
        'print(about["labels"][torch.export.load("model.pt2").module()(x).argmax()])\n')
    assert run(sys.executable, 'program.py', cwd=tmp_path) == 'cat\n'


def test_the_tests_of_the_source_distribution_pass_on_the_wheel(environment, wheel, source):
    install(environment, f'{wheel}[test]')
    out = run(
        environment / 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow and not clients and not network',
        '-n', os.environ.get('WORKERS', '2'), '--dist', 'worksteal', *os.environ.get('CORE', '').split(), cwd=source)
    print(out)
    assert re.search(r'\d{3,} passed', out.splitlines()[-1])
