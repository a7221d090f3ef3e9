"""What importing the package does, and who imports whom."""
import ast
import compileall
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / 'timm_crossformer'


def rooms(root):
    """Map the name of every module to its file."""
    names = {}
    for path in sorted(root.rglob('*.py')):
        parts = (root.name, *path.relative_to(root).with_suffix('').parts)
        names['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return names


def imports(name, path, known):
    """List the modules of the package that a module imports, at the top or anywhere else."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[:len(package.split('.')) + 1 - node.level] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from . import x` is the module x, or a name of the package itself
                found.add(f'{base}.{alias.name}' if f'{base}.{alias.name}' in known else base)
    return sorted(found & set(known))


def find_ring(graph):
    """Return modules that import each other in a ring, the first one again at the end; [] if there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name):], name]
        if name in done:
            return []
        path.append(name)
        for target in graph[name]:
            ring = visit(target)
            if ring:
                return ring
        done.add(path.pop())
        return []

    return next((ring for ring in map(visit, sorted(graph)) if ring), [])


def graph_of(root):
    known = rooms(root)
    return {name: imports(name, path, known) for name, path in known.items()}


def test_imports_go_one_way_late_ones_included():
    graph = graph_of(PACKAGE)
    assert 'timm_crossformer.variants' in graph['timm_crossformer.checkpoints.planning']
    assert not graph['timm_crossformer.variants'] and not graph['timm_crossformer.config']
    assert find_ring(graph) == []


@pytest.mark.parametrize('a, b', [
    ('from .b import f', 'def f():\n    from .a import g'),
    ('from . import b', 'import p.a'),
    ('from .sub import x', 'f = 1'),
], ids=['late', 'by-package', 'through-a-folder'])
def test_a_ring_is_found(tmp_path, a, b):
    (tmp_path / 'p' / 'sub').mkdir(parents=True)
    (tmp_path / 'p' / '__init__.py').write_text('from .a import g')
    (tmp_path / 'p' / 'a.py').write_text(a)
    (tmp_path / 'p' / 'b.py').write_text(b)
    (tmp_path / 'p' / 'sub' / '__init__.py').write_text('def x():\n    from ..a import g')
    ring = find_ring(graph_of(tmp_path / 'p'))
    assert ring and ring[0] == ring[-1] and 'p.a' in ring


@pytest.fixture(scope='module')
def around_the_import():
    script = """
import json, warnings
import timm, torch, torch.serialization
from torch.utils.flop_counter import flop_registry
def state():
    return {
        'safe globals': sorted(map(str, torch.serialization.get_safe_globals())),
        'flops': sorted(str(op) for op in flop_registry if not str(op).startswith('timm_crossformer')),
        'threads': torch.get_num_threads(), 'dtype': str(torch.get_default_dtype()),
        'precision': torch.get_float32_matmul_precision(), 'warnings': len(warnings.filters),
    }
before = state()
import timm_crossformer, timm_crossformer.checkpoints.hub, timm_crossformer.cli
import timm_crossformer.export, timm_crossformer.viz
print(json.dumps([before, state()]))
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize('what', [
    'safe globals', 'flops', 'threads', 'dtype', 'precision', 'warnings',
])
def test_import_changes_nothing_in_torch(around_the_import, what):
    before, after = around_the_import
    assert before[what] == after[what]


def test_a_second_import_in_one_process_takes_the_firsts_place_in_timm():
    script = """
import sys, warnings
warnings.simplefilter('error')
import timm, torch
def registered():
    names = timm.list_models('*crossformer*', include_tags=True)
    assert 'crossformer_tiny.in1k' in names and len(set(names)) == len(names)
    return {name: timm.models.get_pretrained_cfg(name).to_dict() for name in names}
import timm_crossformer as first
before, image = registered(), torch.rand(1, 3, 64, 64)
old = timm.create_model('test_crossformer.cifar10', pretrained=True).eval()
for name in [name for name in sys.modules if name.partition('.')[0] == 'timm_crossformer']:
    del sys.modules[name]
import timm_crossformer as second
new = timm.create_model('test_crossformer.cifar10', pretrained=True).eval()
assert type(old) is first.CrossFormer is not second.CrossFormer is type(new)
assert registered() == before and torch.equal(old(image), new(image))
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.slow
def test_compiled_files_serve_without_their_sources(tmp_path):
    """As in a frozen application. Triton wants text, so PyTorch serves."""
    copy = tmp_path / 'timm_crossformer'
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(PACKAGE.parent / 'weights', copy / 'weights')
    assert compileall.compile_dir(copy, quiet=2, legacy=True)
    for source in copy.rglob('*.py'):
        source.unlink()
    code = (
        'import timm, torch, timm_crossformer as t; from timm_crossformer.ops import triton; '
        'model = timm.create_model("test_crossformer", pretrained=True).eval(); '
        'print(t.__file__, triton.is_installed(), model(torch.zeros(1, 3, 64, 64)).isfinite().all().item())')
    done = subprocess.run(
        [sys.executable, '-c', code], env=dict(os.environ, PYTHONPATH=str(tmp_path)), cwd=tmp_path,
        capture_output=True, text=True)
    assert done.stdout.split() == [str(copy / '__init__.pyc'), 'False', 'True'], done.stderr
