"""Linear layers by oneDNN and MLPs in chunks: the same numbers, visible to whoever observes a layer."""
import copy

import pytest
import torch
import torch.nn.functional as F
from common import GROUPINGS, noise, small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer.layers.attention as attention
import timm_crossformer.layers.linear as module
from timm_crossformer.layers.linear import linear

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


@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('chunk', [1, 1000, 20000])
def test_chunks_give_the_same(chunk, grouping, monkeypatch):
    model, x = small(lda_grouping=grouping), noise(2, 3, 75, 90)  # runs of several lengths, in all stages but the last
    expected = model(x)  # with gradients: as a whole
    monkeypatch.setattr(module, '_CHUNK', chunk)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('most', [1, 40, 700])
def test_a_bias_built_in_pieces_gives_the_same(most):
    groups, gh, gw, heads = 3, 4, 5, 2
    qkv, table = torch.randn(groups * gh * gw, 3 * heads * 8), torch.randn(heads, 2 * gh - 1, 2 * gw - 1)
    bias = attention.run_bias(table, heads, gh, gw)
    whole = attention.attend_run(qkv, (groups, gh, gw), table, bias, heads, 0., True)
    assert attention.run_bias(table, heads, gh, gw, most) is None
    pieces = attention.attend_run(qkv, (groups, gh, gw), table, None, heads, 0., True, most)
    torch.testing.assert_close(pieces, whole)


def test_a_block_works_on_chunks_but_not_under_observation(monkeypatch):
    model, x = small(), noise(2, 3, 75, 90)
    monkeypatch.setattr(module, '_CHUNK', 12800)
    block = model.stages[0].blocks[0]
    maps = [2, 19, 23, 32]
    sizes = {'qkv': [], 'fc1': []}

    def fake(layer, x):
        for name, of in (('qkv', block.attn.qkv), ('fc1', block.mlp.fc1)):
            if layer is of:
                sizes[name].append(x.shape[:-1].numel())
        return layer(x)

    monkeypatch.setattr(attention, 'linear', fake)
    monkeypatch.setattr(module, 'linear', fake)
    with torch.inference_mode():
        model(x)
        assert max(sizes['qkv']) <= 12800 / 96 and max(sizes['fc1']) <= 12800 / 128
        assert sum(sizes['qkv']) == sum(sizes['fc1']) == 2 * 19 * 23
        seen = []
        for layer in (block.norm2, block.mlp, block.mlp.fc2):
            layer.register_forward_hook(lambda *args: seen.append(args[-1].shape))
        block.attn.qkv.register_forward_pre_hook(lambda *args: seen.append(args[-1][0].shape))
        model(x)
    assert seen[0].numel() == 2 * 19 * 23 * 32
    assert list(seen[1]) == maps and len(seen) == 4


def test_a_model_gives_the_same_either_way(calls):
    model, x = small(), noise(2, 3, 75, 90)
    with torch.inference_mode():
        fast = model(x)
        count = len(calls)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = copy.deepcopy(model)(x)
    assert count == 4 * 10 == len(calls)  # qkv, proj, fc1, fc2 of ten blocks
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
