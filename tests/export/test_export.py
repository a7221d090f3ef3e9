"""One graph for every size: torch.export, ONNX, OpenVINO, torch.compile."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from common import GROUPINGS, lively, noise, small
from timm.models._hub import save_for_hf
from torch._inductor.utils import run_and_get_code

import timm_crossformer
from timm_crossformer import export
from timm_crossformer.export import export_model, export_program, load_exported, verify_exported
from timm_crossformer.layers import CrossFormerBlock

# What exporters and runtimes say of themselves and of each other.
pytestmark = [pytest.mark.filterwarnings(f'ignore::{name}') for name in (
    'DeprecationWarning', 'FutureWarning', 'UserWarning', 'ImportWarning')]


def shallow(**kwargs):
    # The third stage has two blocks with the same groups, which share their indices.
    return lively(timm.create_model('test_crossformer', depths=(2, 1, 3, 1), **kwargs))


ROOT = Path(__file__).parents[2]
ONE_QUICK = pytest.mark.parametrize('grouping', [
    pytest.param(g, marks=[] if g == 'map' else [pytest.mark.slow]) for g in GROUPINGS])


@ONE_QUICK
def test_an_exported_program_takes_sizes_it_has_not_seen(grouping):
    model = shallow(lda_grouping=grouping, num_classes=10)
    program = export_program(model).module()
    # grouped and whole maps, strips, odd sizes, one image and several
    for batch, h, w in ((2, 224, 224), (1, 33, 97), (3, 300, 65), (1, 47, 500)):
        x = noise(batch, 3, h, w)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_program_of_one_size(tmp_path):
    model = shallow(num_classes=10, fit_groups=True)
    with pytest.raises(ValueError, match='`fit_groups` chooses groups for one image size'):
        export_program(model)
    path = export_model(model, tmp_path / 'one.pt2', 'torch', size=(96, 64), dynamic=False)
    assert verify_exported(model, path, [(1, 96, 64)])[1, 96, 64] < 1e-4


# A process that knows nothing of this package runs a saved program.
RUN_A_PROGRAM = '''
import sys, torch
program = torch.export.load(sys.argv[1]).module()
print([tuple(level.shape) for level in program(torch.zeros(3, 3, 65, 200))], "timm_crossformer" in sys.modules)
'''


# Classifiers go through the same in test_practice.py, in Python.
@pytest.mark.slow
@pytest.mark.parametrize('format, suffix', [('torch', 'pt2'), ('onnx', 'onnx'), ('openvino', 'xml')])
def test_the_command_exports_a_pyramid_for_all_sizes_without_a_warning(format, suffix, tmp_path):
    pytest.importorskip(format)
    weights, folder = tmp_path / 'weights', tmp_path / 'files'
    folder.mkdir()
    save_for_hf(lively(timm.create_model('test_crossformer', depths=(2, 1, 1, 1))), weights, safe_serialization=True)
    result = subprocess.run([
        sys.executable, '-W', 'error', '-m', 'timm_crossformer', 'export', f'model.{suffix}',
        '--model', f'local-dir:{weights}', '--features', '--pretrained', '--format', format, '--dynamic', '--verify',
        '--json',
    ], cwd=folder, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'Warning' not in result.stderr and 'Exception ignored' not in result.stderr
    verified = json.loads(result.stdout)['verified']
    assert (191, 70) in {(probe['height'], probe['width']) for probe in verified}
    assert max(probe['difference'] for probe in verified) < 1e-4
    path = folder / f'model.{suffix}'
    others = [f'{path.name}.json', *(['model.bin'] if suffix == 'xml' else [])]
    assert {p.name for p in folder.iterdir()} == {path.name, *others}
    if format == 'onnx':
        assert str(Path(timm_crossformer.__file__).parent).encode() not in path.read_bytes()
    if format == 'torch':
        result = subprocess.run(
            [sys.executable, '-c', RUN_A_PROGRAM, str(path)], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == '[(3, 32, 17, 50), (3, 48, 9, 25), (3, 64, 5, 13), (3, 96, 3, 7)] False'


def test_wrong_exports(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`format` is one of onnx, torch, openvino, got 'tflite'\."):
        export_model(small(), tmp_path / 'm.onnx', 'tflite')
    with pytest.raises(ValueError, match=r'A file of format onnx ends in \.onnx, got m\.pt\.'):
        export_model(small(), tmp_path / 'm.pt', 'onnx')
    with pytest.raises(ValueError, match=r'An exported file ends in \.onnx, \.pt2, \.xml, got m\.pt\.'):
        load_exported(tmp_path / 'm.pt')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'Format onnx needs the package onnxscript\. Run `pip install'):
        export_model(small(), tmp_path / 'm.onnx', 'onnx')
    with pytest.raises(ValueError, match=r'needs to be a CrossFormer of timm_crossformer, got ByobNet\.'):
        export_model(timm.create_model('test_byobnet'), tmp_path / 'm.pt2', 'torch')
    assert not list(tmp_path.iterdir())


def test_an_export_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = small().train()
    model.stages[1].eval()
    modes = [module.training for module in model.modules()]

    def refuse(traced, *args):
        assert not any(module.training for module in traced.modules())
        raise ValueError('no')

    monkeypatch.setattr(export, 'export_program', refuse)
    with pytest.raises(ValueError, match='no'):
        export_model(model, tmp_path / 'm.pt2', 'torch')
    assert [module.training for module in model.modules()] == modes


def test_a_file_is_verified_against_the_model_in_evaluation(monkeypatch):
    model = lively(small(drop_rate=.5))
    exported = copy.deepcopy(model).eval()
    monkeypatch.setattr(export, 'load_exported', lambda path: torch.no_grad()(lambda x: [exported(x)]))
    for mode in (False, True):
        assert set(verify_exported(model.train(mode), 'm.pt2', [(2, 64, 64), (1, 40, 33)]).values()) == {0.}
        assert model.training == mode


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 12),
    reason='before torch 2.12 the conditions of a graph for all sizes are megabytes of C++, minutes to compile')
@ONE_QUICK
def test_compiled_for_inference_one_graph_serves_all_sizes(grouping):
    model = shallow(lda_grouping=grouping, num_classes=10)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.inference_mode():
        # A square image first would tie height to width: torch takes equal sizes for one until it sees them differ.
        for batch, h, w in ((2, 230, 310), (2, 224, 224), (2, 65, 97), (3, 300, 65), (2, 47, 500)):
            x = noise(batch, 3, h, w)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_for_training_gradients_are_the_same():
    model, x = shallow(num_classes=10), noise(2, 3, 72, 50)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item() + 1e-4)


def _small_and_compiled(**args):
    model = lively(timm.create_model(
        'test_crossformer', num_classes=10, depths=(2,), embed_dim=32, num_heads=(2,), interval=(2,), group_size=3))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return model, torch.compile(model, **args)


@pytest.mark.slow
@pytest.mark.parametrize(('dynamic', 'graphs'), [(None, [1, 2, 2, 3]), (True, [1, 1, 1, 2])], ids=str)
def test_compiled_for_training_few_graphs_serve_all_sizes(dynamic, graphs):
    model, compiled = _small_and_compiled(backend='aot_eager', dynamic=dynamic)
    seen = []
    for h, w in ((37, 29), (64, 48), (33, 65), (12, 40)):  # in the last a group is the whole map
        x = noise(2, 3, h, w)
        grads = [torch.autograd.grad(net(x).square().sum(), list(model.parameters())) for net in (compiled, model)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item() + 1e-4)
        seen.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert seen == graphs
    assert not torch._dynamo.utils.counters['graph_break']


@pytest.mark.slow
@pytest.mark.parametrize('args', [dict(mode='max-autotune-no-cudagraphs'), dict(dynamic=True)], ids=str)
def test_ways_of_compiling(args):
    model, compiled = _small_and_compiled(**args)
    with torch.no_grad():
        for h, w in ((37, 29), (64, 48)):
            x = noise(2, 3, h, w)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_biases_are_looked_up_once():
    """Inside the loops over all groups, the lookup would be most of the time of attention."""
    model, compiled = _small_and_compiled()
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, noise(2, 3, 24, 24))  # maps of 6 x 6: all groups of 3 x 3 are full
    lookups = [line for line in code.splitlines() if 'std::min(' in line and 'std::max(' in line and 'in_ptr' in line]
    assert len(lookups) == sum(isinstance(module, CrossFormerBlock) for module in model.modules())


@pytest.mark.slow
def test_compiled_with_frozen_weights():
    model, compiled = _small_and_compiled()
    form = torch.compile(timm.utils.reparameterize_model(model))
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for net, h, w in ((compiled, 24, 24), (form, 24, 24), (form, 37, 29)):
            x = noise(2, 3, h, w)
            torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_stay_below_the_limit_that_docs_name():
    model = lively(timm.create_model(
        'test_crossformer', num_classes=10, depths=(2, 2, 6, 2), embed_dim=16, num_heads=(1, 2, 2, 4),
        interval=(4, 2, 2, 1), group_size=3, cooling=True))
    x = noise(2, 3, 96, 96)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=16, fail_on_recompile_limit_hit=True):
        expected = model(x)
        for module in model.modules():
            if isinstance(module, CrossFormerBlock):
                module.compile(backend='eager', fullgraph=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor():
    model, x = shallow(num_classes=10), noise(2, 3, 72, 50)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='limits of files are signals elsewhere')
@pytest.mark.parametrize('name, format', [('m.onnx', 'onnx'), ('m.pt2', 'torch'), ('m.xml', 'openvino')])
def test_a_file_that_cannot_be_written_is_one_line(name, format, tmp_path):
    code = (
        'import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import torch; '
        'from timm_crossformer.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); '
        f'sys.exit(main(["export", "out/{name}", "--model=test_crossformer", "--size=64", "--format={format}"]))')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr and done.stderr.splitlines()[-1].startswith('timm-crossformer: '), done.stderr
    assert [path for path in (tmp_path / 'out').rglob('*') if path.is_file()] == []
