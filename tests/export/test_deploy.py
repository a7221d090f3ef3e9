"""Files for one image size, in the tools that deploy them."""
import collections
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from common import lively, noise, small
from PIL import Image

from timm_crossformer import export, reparameterize
from timm_crossformer.export import export_model, export_program, verify_exported
from timm_crossformer.inference import InferenceAttention
from timm_crossformer.precision import to_half, to_int8

ROOT = Path(__file__).parents[2]

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
# What exporters and runtimes say of themselves and of each other.
pytestmark = [pytest.mark.filterwarnings(f'ignore::{name}') for name in (
    'DeprecationWarning', 'FutureWarning', 'UserWarning', 'ImportWarning')]

PLAIN = {
    'Add', 'Concat', 'Conv', 'Gelu', 'Gemm', 'Identity', 'LayerNormalization', 'MatMul', 'Pad', 'ReduceMean', 'Reshape',
    'Slice', 'Softmax', 'Transpose'}


def two_stages(**kwargs):
    return lively(timm.create_model('test_crossformer', **dict(dict(
        num_classes=10, depths=(2, 2), embed_dim=32, num_heads=(2, 4), interval=(2, 1), group_size=(3, 4)), **kwargs)))


def kinds(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def run_plainly(path, x, optimise=True):
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(y) for y in session.run(None, {'image': x.numpy()})]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Return a model and its file for one size, with groups to pad and an open batch."""
    model = two_stages()
    path = export_model(model, tmp_path_factory.mktemp('one') / 'one.onnx', size=(61, 70), dynamic='batch')
    return model, path


def test_a_file_of_one_size_holds_plain_operators(exported):
    model, path = exported
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    assert set(kinds(path)) <= PLAIN
    assert kinds(path)['MatMul'] == 4 * 8 and kinds(path)['Softmax'] == 4
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [('', export.OPSET)]
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == ['batch', 3, 61, 70]
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    biases = [shape for shape in weights.values() if len(shape) == 4 and shape[0] == 1 and shape[2] == shape[3]]
    assert len(biases) == 4  # of every pair of members, one for each block
    for batch in (1, 3):
        x = noise(batch, 3, 61, 70)
        for optimise in (False, True):
            torch.testing.assert_close(run_plainly(path, x, optimise)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('args, size, dynamic, batch', [
    (dict(lda_grouping='region'), (97, 130), False, 2),
    pytest.param(dict(lda_grouping='grid', fit_groups=True), (40, 97), False, 1, marks=pytest.mark.slow),
    pytest.param(dict(lda_grouping='map', interval=(3, 2)), (75, 33), 'batch', 1, marks=pytest.mark.slow),
    pytest.param(dict(cooling=True, depths=(4, 1), group_size=(2, 5)), (50, 64), 'batch', 1, marks=pytest.mark.slow),
    pytest.param(dict(features_only=True, lda_grouping='region'), (64, 96), 'batch', 1, marks=pytest.mark.slow),
    pytest.param(dict(pos_bias='lucidrains', qkv_bias=False), (70, 70), False, 3, marks=pytest.mark.slow),
    pytest.param(dict(head_dim=8, global_pool='max'), (33, 9), False, 1, marks=pytest.mark.slow),
], ids=str)
def test_programs_of_one_size_are_the_model(args, size, dynamic, batch):
    model = two_stages(**args)
    program = export_program(model, size, dynamic, batch).module()
    for images in (1, 4) if dynamic else (batch,):
        x = noise(images, 3, *size)
        found, expected = program(x), model(x)
        for a, b in zip(*((y if isinstance(y, list) else [y]) for y in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    kinds = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert not any('index' in kind or 'gather' in kind or 'arange' in kind for kind in kinds)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['crossformer_tiny', 'crossformer_small', 'crossformer_pp_small'])
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_variants_of_one_size(variant, format, tmp_path):
    model = lively(timm.create_model(variant, num_classes=10))
    path = export_model(model, tmp_path / f'm{export.FORMATS[format]}', format, (224, 224), 'batch')
    assert max(verify_exported(model, path, [(1, 224, 224), (2, 224, 224)]).values()) < 1e-4
    if format == 'onnx':
        assert set(kinds(path)) <= PLAIN


def test_blocks_of_other_layers_stay_in_the_export():
    model = two_stages()
    model.stages[0].blocks[1].drop_path2 = torch.nn.LayerNorm(32)
    x = noise(1, 3, 61, 70)
    program = export_program(model, (61, 70), False).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_onnxruntime_quantises_by_name_and_weights(exported, tmp_path):
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic

    model, path = exported
    quantize_dynamic(path, tmp_path / 'int8.onnx')
    assert kinds(tmp_path / 'int8.onnx')['MatMulInteger'] >= 4 * 6  # all but the products of two activations
    quant_pre_process(str(path), str(tmp_path / 'pre.onnx'))  # infers shapes by symbols
    x = noise(2, 3, 61, 70)
    torch.testing.assert_close(run_plainly(tmp_path / 'pre.onnx', x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_onnxruntime_converts_to_half_precision(exported, tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model, path = exported
    onnx.save(convert_float_to_float16(onnx.load(path)), tmp_path / 'half.onnx')
    assert verify_exported(model, tmp_path / 'half.onnx', [(1, 61, 70)])[1, 61, 70] < 2e-2


def test_dimensions_are_overridden_by_name(exported):
    _, path = exported
    options = ort.SessionOptions()
    options.add_free_dimension_override_by_name('batch', 2)
    session = ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == [2, 3, 61, 70]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_files_in_the_precision_of_the_model(dtype, tmp_path):
    model = two_stages(depths=(1,), num_heads=(2,), interval=(2,), group_size=3).to(dtype)
    path = export_model(model, tmp_path / 'm.pt2', 'torch', (40, 40), False)
    assert verify_exported(model, path, [(1, 40, 40)])[1, 40, 40] < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize('format, suffix', [('onnx', 'onnx'), ('openvino', 'xml')])
def test_no_file_holds_what_onnx_has_not(format, suffix, tmp_path):
    with pytest.raises(ValueError, match=r'no convolution in bfloat16. Export `model.float\(\)`'):
        export_model(small().bfloat16(), tmp_path / f'm.{suffix}', format, (40, 40), False)
    assert not list(tmp_path.iterdir())


def test_a_model_to_be_compiled_and_one_of_buffers_alone_export():
    model, x = small(), torch.randn(1, 3, 40, 40)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                delattr(module, name)
                module.register_buffer(name, p.detach())
    program = export.export_program(torch.compile(model), (40, 40), False)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_differences_are_never_lost(monkeypatch):
    model = small(num_classes=1)
    answers = []
    monkeypatch.setattr(export, 'load_exported', lambda path: lambda x: [answers.pop(0)])
    with torch.no_grad():
        x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        right = model(x)
    for answer, fits in ((right, True), (right * 1.1, False), (right * torch.nan, False)):
        answers.append(answer)
        difference, = verify_exported(model, 'm.onnx', [(1, 40, 40)]).values()
        assert (difference < 1e-5) == fits and (difference == difference) == bool(answer.isfinite().all())
    answers.append(right[:, :0])
    with pytest.raises(ValueError, match='it is of another'):
        verify_exported(model, 'm.onnx', [(1, 40, 40)])


def test_programs_hold_no_paths(tmp_path):
    model = two_stages(depths=(1,), num_heads=(2,), interval=(2,), group_size=3)
    path = export_model(model, tmp_path / 'm.pt2', 'torch', (40, 40), False)
    with zipfile.ZipFile(path) as archive:
        assert not any(b'.py' in archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize('args', [{}, dict(crop_mode='center', crop_pct=.875)], ids=str)
def test_the_example_prepares_images_as_timm_does(args):
    image = Image.open(ROOT / 'examples' / 'photo.jpg').convert('RGB')
    model = timm.create_model('test_crossformer', pretrained_cfg_overlay=args)
    about = export.describe_input(model, (64, 64))
    prepare = runpy.run_path(str(ROOT / 'examples' / 'deploy.py'))['prepare']
    data = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**dict(data, input_size=(3, 64, 64)))(image)
    np.testing.assert_allclose(prepare(image, about['preprocessing'])[0], expected.numpy(), atol=1e-5)
    assert about['labels'] is None or len(about['labels']) == model.num_classes


def test_wrong_precisions(tmp_path):
    for args, words in [
            (dict(dtype='int4'), r"`dtype` is one of fp32, fp16, int8, got 'int4'\."),
            (dict(dtype='int8'), "`dtype` 'int8' and `calibrate` go together"),
            (dict(dtype='int8', calibrate=[]), "`dtype` 'int8' is for files of one image size"),
            (dict(dtype='fp16', format='torch'), '`dtype` fp16 is for ONNX files of models in fp32')]:
        suffix = export.FORMATS[args.get('format', 'onnx')]
        with pytest.raises(ValueError, match=words):
            export_model(small(), tmp_path / f'm{suffix}', **args)
    with pytest.raises(ValueError, match='holds 0 images, fewer than a batch of 1'):
        export.calibration(small(), tmp_path, (64, 64))
    assert not list(tmp_path.iterdir())


def test_half_precision_and_int8_keep_what_is_sensitive(exported, tmp_path):
    model, path = exported
    to_half(path, tmp_path / 'half.onnx')
    difference = verify_exported(model, tmp_path / 'half.onnx', [(2, 61, 70)])[2, 61, 70]
    assert 1e-5 < difference < 1e-2
    half = onnx.load(tmp_path / 'half.onnx')
    scales = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    softmax_inputs = {node.input[0] for node in half.graph.node if node.op_type == 'Softmax'}
    casts = {out for node in half.graph.node if node.op_type == 'Cast' for out in node.output}
    assert softmax_inputs <= casts
    assert onnx.TensorProto.FLOAT16 in scales.values()
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    to_int8(path, tmp_path / 'int8.onnx', (noise(2, 3, 61, 70, seed=seed) for seed in range(4)))
    assert verify_exported(model, tmp_path / 'int8.onnx', [(2, 61, 70)])[2, 61, 70] < .3
    assert (tmp_path / 'int8.onnx').stat().st_size < .5 * path.stat().st_size
    with pytest.raises(ValueError, match='no images to calibrate with'):
        to_int8(path, tmp_path / 'none.onnx', [])


@pytest.mark.parametrize('half', [False, True], ids=['fp32', 'fp16'])
def test_tensorrt_lists_all_of_it(exported, half, tmp_path):
    """docs/operators.md of onnx-tensorrt 10.15: each of these kinds, in fp32 and fp16, under the conditions below."""
    _, path = exported
    if half:
        to_half(path, tmp_path / 'half.onnx')
        path = tmp_path / 'half.onnx'
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert set(kinds(path)) <= PLAIN | {'Cast'}
    assert 9 <= export.OPSET <= 24
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    assert {weight.data_type for weight in weights.values()} <= {*floats, onnx.TensorProto.INT64}  # shapes and axes
    values = [value for value in (*graph.input, *graph.output, *graph.value_info) if value.name not in weights]
    assert len(values) >= len(graph.node)
    for value in values:
        assert value.type.tensor_type.elem_type in floats and len(value.type.tensor_type.shape.dim) <= 8
    for node in graph.node:
        assert node.domain == '' and len(node.output) == 1  # of LayerNormalization, the first alone
        if node.op_type == 'Conv':
            assert len(weights[node.input[1]].dims) == 4
        if node.op_type in ('ReduceMean', 'Pad', 'Slice', 'Reshape'):
            assert all(name in weights for name in node.input[1:] if name)


def test_wrong_sizes_and_batches():
    for args, words in [
            (dict(dynamic='height'), r"`dynamic` is True, False or 'batch', got 'height'\."),
            (dict(dynamic=True, batch=4), r'`batch` is for a batch that is not left open, got 4\.'),
            (dict(dynamic=False, batch=0), r'from 1 up, got \(230, 310\) and 0\.'),
            (dict(dynamic=False, size=(0, 5)), r'from 1 up, got \(0, 5\) and 1\.')]:
        with pytest.raises(ValueError, match=words):
            export_program(small(), **args)


def test_tables_for_wide_maps_are_constants_too():
    fast = reparameterize(timm.create_model(
        'test_crossformer', depths=(2,), embed_dim=32, num_heads=(1,), interval=(8,), group_size=4), (720, 760))
    tables = [module.table.shape[1:] for module in fast.modules() if isinstance(module, InferenceAttention)]
    assert tables == [(7, 7), (45, 47)]  # 180 x 190 tokens with an interval of 8 are groups of 23 x 24
