"""Tools that count, draw, hook, offload: what they find is what they find in timm's own models."""
import contextlib
import io

import pytest
import timm
import torch
from common import lively, noise, small
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]

# ---- counters: multiplications in 10^9 of crossformer_small at 224 px

PAPER = 4.91
# The two products of attention, which a counter of modules leaves out, in Swin as well, and one of operators that knows
# PyTorch's alone. FlopCounterMode knows ours, and fvcore's tracer takes it apart.
ATTENTION = .14


def _fvcore(client, model, x):
    counter = client('fvcore.nn').FlopCountAnalysis(model, x)
    return counter.unsupported_ops_warnings(False).total(), PAPER


def _ptflops(backend):
    def count(client, model, x):
        with contextlib.redirect_stdout(io.StringIO()):
            macs, _ = client('ptflops').get_model_complexity_info(
                model, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend=backend)
        return macs, PAPER - ATTENTION
    return count


def _thop(client, model, x):
    return client('thop').profile(model, (x,), verbose=False)[0], PAPER - ATTENTION


def _torchinfo(client, model, x):
    # By its rule a module counts its parameters once for each entry of the first dimension, so a linear layer not for
    # each token; a convolution for each pixel.
    def counted(model):
        counts = []

        def count(module, args, out):
            pixels = out.shape[2:].numel() if isinstance(module, torch.nn.Conv2d) else 1
            counts.append(out.shape[0] * pixels * sum(p.numel() for p in module.parameters(recurse=False)))

        handles = [module.register_forward_hook(count) for module in model.modules() if not list(module.children())]
        model(x)
        for handle in handles:
            handle.remove()
        return sum(counts)

    swin = timm.create_model('swin_tiny_patch4_window7_224').eval()
    count = client('torchinfo').summary
    assert count(swin, x.shape, verbose=0).total_mult_adds == pytest.approx(counted(swin), rel=.03)
    return count(model, x.shape, verbose=0).total_mult_adds, counted(model) / 1e9


@pytest.mark.parametrize('tool', [
    pytest.param(tool, id=name) for name, tool in dict(
        fvcore=_fvcore, ptflops_pytorch=_ptflops('pytorch'), ptflops_aten=_ptflops('aten'), thop=_thop,
        torchinfo=_torchinfo).items()])
def test_counters(client, tool):
    counted, expected = tool(client, timm.create_model('crossformer_small').eval(), torch.zeros(1, 3, 224, 224))
    assert counted / 1e9 == pytest.approx(expected, rel=.03 if tool is _torchinfo else .015)


# ---- walkers of modules


def test_torchsummary(client, capsys):
    model = small()
    client('torchsummary').summary(model, (3, 70, 101), device='cpu')
    parameters = sum(p.numel() for p in model.parameters())
    assert f'Total params: {parameters:,}' in capsys.readouterr().out


def test_torchview(client):
    graph = client('torchview').draw_graph(small(), input_size=(1, 3, 70, 101), depth=10, expand_nested=True)
    source = str(graph.visual_graph)
    assert source.count('DynamicPosBias') >= 10 and '(1, 96, 3, 4)' in source


def test_tensorboard(client, tmp_path):
    client('tensorboard')
    with client('torch.utils.tensorboard').SummaryWriter(tmp_path) as writer:
        writer.add_graph(small(), noise(1, 3, 70, 101))
    file, = tmp_path.iterdir()
    assert b'DynamicPosBias[pos_bias]' in file.read_bytes()


# ---- offloading


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A model, images, their logits, and a file of the weights."""
    model, x = small(cooling=True), noise(2, 3, 70, 101)
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    save_file(model.state_dict(), path, metadata={'format': 'pt'})
    with torch.no_grad():
        return x, model(x), path


@pytest.mark.parametrize('way', ['cpu', 'disk'])
def test_offloaded_weights(client, weights, way, tmp_path):
    accelerate, (x, expected, _) = client('accelerate'), weights
    model, cpu = small(cooling=True), torch.device('cpu')
    if way == 'cpu':
        accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    assert all(p.is_meta for p in model.parameters())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def _every_second(model):
    leaves = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    return {name: 'disk' if i % 2 else 'cpu' for i, name in enumerate(leaves)}


def test_a_device_map_may_split_a_block(client, weights, tmp_path):
    accelerate, (x, expected, path) = client('accelerate'), weights
    with accelerate.init_empty_weights():
        model = timm.create_model('test_crossformer', num_classes=10, cooling=True).eval()
    assert all(p.is_meta for p in model.parameters())
    model = accelerate.load_checkpoint_and_dispatch(
        model, str(path), device_map=_every_second(model), offload_folder=tmp_path)
    assert 0 < sum(p.is_meta for p in model.parameters()) < len(list(model.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('split', [False, True], ids=['one device', 'disk'])
def test_transformers_device_map(client, split, tmp_path):
    hf = client('transformers')
    client('accelerate')
    config = hf.TimmWrapperConfig(architecture='test_crossformer', num_labels=10)
    model, x = hf.TimmWrapperForImageClassification(config).eval(), noise(1, 3, 70, 101)
    lively(model.timm_model)
    model.save_pretrained(tmp_path / 'model')
    places = {'': 'cpu'}
    if split:
        places = {f'timm_model.{name}': 'cpu' for name in ('stem', 'stages.0', 'stages.1', 'norm', 'head')}
        places.update({'timm_model.stages.2.blocks': 'disk', 'timm_model.stages.2.downsample': 'cpu',
                       'timm_model.stages.3': 'disk'})
    loaded = hf.TimmWrapperForImageClassification.from_pretrained(
        tmp_path / 'model', device_map=places, offload_folder=tmp_path / 'offload').eval()
    assert any(p.is_meta for p in loaded.parameters()) == split
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
