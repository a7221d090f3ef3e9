import pytest
import torch
import torch.nn.functional as F
from common import noise, small
from torch import nn

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]
# Relative L2 error of the logits of the test model; a fault in a cast or a mask costs far more.
LIMITS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _images(device='cpu'):
    return noise(2, 3, 70, 101).to(device)


def _drift(low, reference):
    assert low.isfinite().all()
    return ((low.float() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('cast', ['autocast', 'to'])
def test_drift_of_half_precision(device, dtype, cast):
    model, images = small(cooling=True).to(device), _images(device)
    with torch.no_grad():
        reference = model(images)
        if cast == 'autocast':
            with torch.autocast(device, dtype):
                low = model(images)
        else:
            low = model.to(dtype)(images.to(dtype))
    assert low.dtype == dtype
    assert 0 < _drift(low, reference) < LIMITS[dtype]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_gradients_under_autocast(device, dtype):
    model, images = small().to(device), _images(device)
    labels = torch.tensor([1, 3], device=device)

    def grads():
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    loss = F.cross_entropy(model(images), labels)
    reference = grads()
    with torch.autocast(device, dtype):
        loss = F.cross_entropy(model(images).float(), labels)
    assert _drift(grads(), reference) < 5 * LIMITS[dtype]


# torch.ao announces its end, and so do the quantised tensors it makes.
@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated', 'ignore:torch.quantize_per_tensor')
@pytest.mark.filterwarnings('ignore:.*is deprecated:DeprecationWarning:torch.ao')
def test_int8_linears_of_torch_ao():
    model, images = small(), _images()
    with torch.no_grad():
        reference = model(images)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        low = quantized(images)
    left = [name for name, m in quantized.named_modules() if type(m) is nn.Linear]
    assert left == []
    assert 0 < _drift(low, reference) < .15


@pytest.fixture
def quantized():
    """Quantise a model by a config of torchao, by its name; return it, its images and its logits."""
    torchao = pytest.importorskip('torchao.quantization')
    model, images = small(), _images()

    def quantize(config):
        with torch.no_grad():
            reference = model(images)
            torchao.quantize_(model, getattr(torchao, config)())
            low = model(images)
        assert 0 < _drift(low, reference) < .15
        return model, images, low
    return quantize


@pytest.mark.clients
@pytest.mark.filterwarnings('default')  # other packages warn of each other
def test_int8_linears_of_torchao(quantized):
    model, _, _ = quantized('Int8DynamicActivationInt8WeightConfig')
    assert 'AffineQuantized' in str(model.stages[0].blocks[0].attn.qkv) or 'Int8' in str(
        model.stages[0].blocks[0].attn.qkv)


@pytest.mark.clients
@pytest.mark.filterwarnings('default')
def test_compiled_with_int8_weights_of_torchao(quantized):
    model, images, low = quantized('Int8WeightOnlyConfig')
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(images), low, rtol=1e-4, atol=1e-5)
        wider = images[..., :-6]  # another size, by the same weights
        torch.testing.assert_close(compiled(wider), model(wider), rtol=1e-4, atol=1e-5)
