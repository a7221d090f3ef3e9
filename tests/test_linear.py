"""Linear layers by oneDNN and MLPs in chunks: the same numbers, visible to whoever observes a layer."""
import copy

import pytest
import torch
import torch.nn.functional as F
from common import noise, small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer.layers.linear as module
from timm_crossformer.layers.linear import Mlp, linear

pytestmark = pytest.mark.filterwarnings('ignore:TF32 acceleration')  # flags() sets everything, for Intel GPUs as well


@pytest.fixture(autouse=True)
def onednn_for_little_work(monkeypatch):
    if module._onednn_linear is None:
        pytest.skip('this build of PyTorch has no oneDNN')
    monkeypatch.setattr(module, '_LEAST_WORK', 1)


@pytest.fixture
def calls(monkeypatch):
    """Count calls of oneDNN's operator."""
    seen = []
    operator = module._onednn_linear
    monkeypatch.setattr(module, '_onednn_linear', lambda *args: seen.append(args) or operator(*args))
    return seen


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
@pytest.mark.parametrize('shape', [(5, 6), (2, 3, 4, 6), (1, 6), (0, 6)], ids=str)
def test_it_is_the_same_product(shape, bias, calls):
    layer, x = nn.Linear(6, 7, bias=bias), torch.randn(*shape)
    with torch.inference_mode():
        torch.testing.assert_close(linear(layer, x), F.linear(x, layer.weight, layer.bias))
        transposed = torch.randn(6, 5).t()
        torch.testing.assert_close(linear(layer, transposed), F.linear(transposed, layer.weight, layer.bias))
    assert len(calls) == (2 if x.numel() else 1)


@pytest.mark.parametrize('tensor', [torch.randn(3, 6).bfloat16(), torch.randn(3, 6).double()], ids=['bf16', 'fp64'])
def test_other_precisions_stay_with_pytorch(tensor, calls):
    layer = nn.Linear(6, 7).to(tensor.dtype)
    with torch.no_grad():
        assert torch.equal(linear(layer, tensor), layer(tensor))
    assert not calls


def test_whoever_observes_or_replaces_a_layer_sees_its_calls(calls):
    x = torch.randn(3, 6)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with torch.no_grad():
        layer = nn.Linear(6, 7)
        seen = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        linear(layer, x)
        assert seen == [1]
        layer = Doubled(6, 7)
        assert torch.equal(linear(layer, x), 2 * F.linear(x, layer.weight, layer.bias))
        layer = nn.Linear(6, 7)
        layer.forward = lambda x: x
        assert linear(layer, x) is x
        assert torch.equal(linear(nn.Identity(), x), x)
        with torch.autocast('cpu', torch.bfloat16):
            assert linear(nn.Linear(6, 7), x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            linear(nn.Linear(6, 7), x)
        weights = {'weight': torch.zeros(7, 6), 'bias': torch.zeros(7)}
        weights = {f'layer.{name}': value for name, value in weights.items()}
        assert not torch.func.functional_call(_Wrapped(nn.Linear(6, 7)), weights, x).any()
    assert not calls


class _Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return linear(self.layer, x)


def test_gradients_take_the_usual_way(calls):
    layer, x = nn.Linear(6, 7), torch.randn(3, 6)
    linear(layer, x).sum().backward()
    assert layer.weight.grad is not None
    assert not calls


def test_flops_are_counted():
    layer, x = nn.Linear(6, 7), torch.randn(2, 5, 6)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        linear(layer, x)
    assert counter.get_total_flops() == 2 * 10 * 6 * 7


@pytest.mark.parametrize('length', [1, 7, 64, 10 ** 6])
def test_an_mlp_in_chunks_gives_the_same(length, monkeypatch):
    mlp, x = Mlp(8, 32), torch.randn(2, 5, 7, 8)
    expected = mlp(x)  # gradients: as a whole
    monkeypatch.setattr(module, '_CHUNK', length * 32)
    sizes = []
    mlp.act.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
        assert mlp(x[:0]).shape == (0, 5, 7, 8)
    assert max(sizes) == min(length, 70)


def test_a_model_gives_the_same_either_way(calls):
    model, x = small(), noise(2, 3, 75, 90)
    with torch.inference_mode():
        fast = model(x)
        count = len(calls)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = copy.deepcopy(model)(x)
    assert count == 4 * 10 == len(calls)  # qkv, proj, fc1, fc2 of ten blocks
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
