"""Linear layers by oneDNN, folded convolutions and chunks: the same numbers, visible to whoever observes a layer."""
import copy

import pytest
import torch
import torch.nn.functional as F
from common import GROUPINGS, noise, small
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer.layers.attention as attention
import timm_crossformer.layers.block as blocks
import timm_crossformer.layers.cpu as module
import timm_crossformer.layers.embedding as embedding
from timm_crossformer.layers.cpu import linear

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


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
@pytest.mark.parametrize('shape', [(5, 6), (2, 3, 4, 6), (0, 6)], ids=str)
def test_gradients_are_the_same(shape, bias, calls):
    layer, x = nn.Linear(6, 7, bias=bias), torch.randn(*shape, requires_grad=True)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).sin().sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(linear(layer, x).sin().sum(), wanted), expected)
    expected = torch.autograd.grad(layer(x).sum(), wanted)  # an expanded gradient
    torch.testing.assert_close(torch.autograd.grad(linear(layer, x).sum(), wanted), expected)
    assert len(calls) == (6 if x.numel() else 0)  # forward, and two products backward


@pytest.mark.parametrize('tokens', [3, 6, 7, 40])
@pytest.mark.parametrize('inputs, outputs', [(6, 7), (7, 6), (6, 6)])
def test_gradients_of_weights_are_the_same_for_every_order_of_sizes(inputs, outputs, tokens):
    layer, x = nn.Linear(inputs, outputs), torch.randn(tokens, inputs)
    expected = torch.autograd.grad(layer(x).sin().sum(), layer.weight)
    torch.testing.assert_close(torch.autograd.grad(linear(layer, x).sin().sum(), layer.weight), expected)


def test_only_wanted_gradients_are_computed(calls):
    layer, x = nn.Linear(6, 7), torch.randn(3, 6)
    linear(layer, x).sum().backward()
    assert len(calls) == 2 and layer.weight.grad is not None
    layer.requires_grad_(False)
    assert not linear(layer, x).requires_grad
    x.requires_grad_()
    linear(layer, x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 6))


def test_second_derivatives_are_the_same(calls):
    layer, x = nn.Linear(6, 7), torch.randn(3, 6, requires_grad=True)
    penalties = []
    for apply in (layer, lambda x: linear(layer, x)):
        grad, = torch.autograd.grad(apply(x).sin().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), [x, layer.weight, layer.bias]))
    torch.testing.assert_close(penalties[1], penalties[0])
    assert calls


def test_the_backward_pass_keeps_the_precision_of_the_forward_pass():
    layer, x = nn.Linear(6, 7), torch.randn(3, 6)
    expected, = torch.autograd.grad(layer(x).sin().sum(), layer.weight)
    loss = linear(layer, x).sin().sum()
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(loss, layer.weight)[0], expected)


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')  # within forward_ad
def test_function_transforms_see_the_usual_call(calls):
    layer, x = nn.Linear(6, 7), torch.randn(3, 6)
    torch.testing.assert_close(
        torch.func.grad(lambda x: linear(layer, x).sum())(x), layer.weight.detach().sum(0).expand(3, 6))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones(3, 6))
            tangent = torch.autograd.forward_ad.unpack_dual(linear(layer, dual)).tangent
        torch.testing.assert_close(tangent, layer.weight.detach().sum(1).expand(3, 7))
    assert not calls


def test_hooks_on_gradients_are_called(calls):
    layer, seen = nn.Linear(6, 7), []
    layer.register_full_backward_hook(lambda *args: seen.append(args))
    linear(layer, torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    linear(nn.Linear(6, 7), torch.randn(3, 6))
    handle.remove()
    assert len(seen) == 2
    assert not calls


@pytest.mark.parametrize('kernel', [4, 8, 16, 32])
def test_a_folded_convolution_gives_the_same(kernel):
    layer = nn.Conv2d(3, 5, kernel, stride=4, padding=(kernel - 4) // 2)
    x = torch.randn(2, 3, 24, 36, requires_grad=True)
    shapes = []
    wanted = [x, *layer.parameters()]
    expected, gradients = layer(x), torch.autograd.grad(layer(x).sin().sum(), wanted)
    handle = layer.register_forward_hook(lambda *_: shapes.append(1))
    torch.testing.assert_close(module.strided_conv(layer, x, 4), expected)
    assert shapes == [1]  # observed: called as it is
    handle.remove()
    out = module.strided_conv(layer, x, 4)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), wanted), gradients)
    weight = out.grad_fn.next_functions[1][0].name()
    assert weight in ('PixelUnshuffleBackward0', 'CloneBackward0')  # the latter from a change of memory format
    with torch.no_grad():
        assert torch.equal(module.strided_conv(layer, x, 4), layer(x))


@pytest.mark.parametrize('act', [nn.GELU(), nn.GELU('tanh'), nn.SiLU()], ids=['gelu', 'tanh', 'silu'])
def test_an_activation_follows(act, calls):
    layer, x = nn.Linear(6, 7), torch.randn(3, 6, requires_grad=True)
    expected = act(layer(x))
    torch.testing.assert_close(linear(layer, x, act), expected)
    assert calls[-1][3] == 'none'  # gradients of a GELU need what it was given
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x, act), expected)
        assert calls[-1][3] == ('gelu' if isinstance(act, nn.GELU) and act.approximate == 'none' else 'none')
        seen = []
        act.register_forward_hook(lambda *args: seen.append(args[1][0]))
        torch.testing.assert_close(linear(layer, x, act), expected)
        torch.testing.assert_close(seen, [layer(x)])
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(linear(layer, x, nn.GELU()), F.gelu(layer(x)))


@pytest.mark.parametrize('size', [(2, 2), (6, 4)], ids=str)
@pytest.mark.parametrize('kernel', [2, 4])
def test_a_convolution_with_many_weights_gives_the_same(kernel, size, calls):
    layer = nn.Conv2d(8, 48, kernel, stride=2, padding=(kernel - 2) // 2)
    x = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = module.strided_conv(layer, x, 2)
        torch.testing.assert_close(out, layer(x))
        assert len(calls) == (layer.weight.numel() >= 10 * x.numel()) and out.stride() == layer(x).stride()
        with torch.backends.mkldnn.flags(enabled=False):
            plain = module.strided_conv(layer, x, 2)
        torch.testing.assert_close(plain, out)
        assert plain.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('heads_of_bias', [1, 3])
def test_products_attend_as_the_fused_kernel_does(heads_of_bias, monkeypatch):
    shapes = [5, 3, 8, 4], [5, 3, 12, 4], [5, 3, 12, 4]
    q, k, v = (torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2) for shape in shapes)
    bias = torch.randn(heads_of_bias, 8, 12)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    alone = attention._attend(q, k, v, bias, 0., True, None)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    seen = []
    products = attention._attend_by_products
    monkeypatch.setattr(attention, '_attend_by_products', lambda *args: seen.append(1) or products(*args))
    torch.testing.assert_close(attention._attend(q, k, v, bias, 0., True, None), alone)
    assert seen == [1]
    monkeypatch.setattr(attention, '_FEW_TOKENS', 11)
    assert torch.equal(attention._attend(q, k, v, bias, 0., True, None), alone)
    assert seen == [1]


def test_flops_are_counted():
    layer, x = nn.Linear(6, 7), torch.randn(2, 5, 6)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        linear(layer, x)
    assert counter.get_total_flops() == 2 * 10 * 6 * 7
    q, k, v, bias = torch.randn(5, 3, 8, 4), torch.randn(5, 3, 12, 4), torch.randn(5, 3, 12, 4), torch.randn(3, 8, 12)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        attention._attend_by_products(q, k, v, bias)
    assert counter.get_total_flops() == 2 * 2 * 15 * 8 * 12 * 4


@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('many', [1, 512], ids=['tiles', 'whole groups'])
@pytest.mark.parametrize('chunk', [1, 1000, 20000, 1 << 19])
def test_chunks_and_tiles_give_the_same(chunk, many, grouping, monkeypatch):
    model, x = small(lda_grouping=grouping), noise(2, 3, 75, 90)  # runs of several lengths, in all stages but the last
    expected = model(x)  # with gradients: as a whole
    monkeypatch.setattr(module, '_CHUNK', chunk)
    monkeypatch.setattr(attention, '_MANY_TOKENS', many)
    monkeypatch.setattr(attention, '_TILE_PAIRS', 50)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('most', [1, 40, 700])
def test_a_bias_built_in_pieces_gives_the_same(most):
    groups, gh, gw, heads = 3, 4, 5, 2
    qkv, table = torch.randn(groups * gh * gw, 3 * heads * 8), torch.randn(heads, 2 * gh - 1, 2 * gw - 1)
    bias = attention.run_bias(qkv, table, heads, gh, gw)
    whole = attention.attend_run(qkv, (groups, gh, gw), table, bias, heads, 0., True)
    assert attention.run_bias(qkv, table, heads, gh, gw, most) is None
    pieces = attention.attend_run(qkv, (groups, gh, gw), table, None, heads, 0., True, most)
    torch.testing.assert_close(pieces, whole)


@pytest.fixture
def tiled(monkeypatch):
    """Let every group be attended to in tiles, and count the calls."""
    seen = []
    attend = attention._attend_in_tiles
    monkeypatch.setattr(attention, '_MANY_TOKENS', 1)
    monkeypatch.setattr(attention, '_attend_in_tiles', lambda *args: seen.append(args) or attend(*args))
    return seen


@pytest.mark.parametrize('pairs', [1, 150, 1 << 19])
@pytest.mark.parametrize('biases', [1, 2], ids=['one bias for all heads', 'a bias per head'])
@pytest.mark.parametrize('gh, gw', [(4, 5), (1, 7), (9, 1), (2, 2)])
def test_tiles_are_attention_with_the_true_bias_of_every_pair(gh, gw, biases, pairs, tiled, monkeypatch):
    groups, heads, dim = 3, 2, 8
    N = gh * gw
    qkv, table = torch.randn(groups * N, 3 * heads * dim), torch.randn(biases, 2 * gh + 1, 2 * gw + 3)  # of larger ones
    monkeypatch.setattr(attention, '_TILE_PAIRS', pairs)
    with torch.inference_mode():
        assert attention.run_bias(qkv, table, heads, gh, gw) is None
        actual = attention.attend_run(qkv, (groups, gh, gw), table, None, heads, 0., True)
    assert len(tiled) == 1
    q, k, v = qkv.double().view(groups, N, 3, heads, dim).unbind(2)
    expected = torch.empty(groups, N, heads, dim, dtype=torch.float64)
    for head in range(heads):
        bias = torch.tensor([[
            table[head % biases, gh + i // gw - j // gw, gw + 1 + i % gw - j % gw].item() for j in range(N)]
            for i in range(N)], dtype=torch.float64)
        for group in range(groups):
            scores = q[group, :, head] @ k[group, :, head].t() * dim ** -0.5 + bias
            expected[group, :, head] = scores.softmax(-1) @ v[group, :, head]
    torch.testing.assert_close(actual.double(), expected.view(groups * N, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # under vmap
def test_tiles_are_for_inference_in_fp32_alone(tiled):
    model, x = small(), noise(1, 3, 75, 90)
    expected = model(x)  # with gradients
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        model(x)
    with torch.no_grad():
        model.double()(x.double())
        small().bfloat16()(x.bfloat16())
        qkv, table = torch.randn(4, 2 * 6, 3 * 4), torch.randn(2, 3, 5)
        torch.func.vmap(lambda qkv: attention.attend_runs(qkv, [(2, 2, 3)], table, 2, 0., True))(qkv)
        small(attn_drop_rate=0.5).train()(x)
    assert not tiled
    with torch.no_grad():
        torch.testing.assert_close(small()(x), expected, rtol=1e-5, atol=1e-5)
    assert tiled


def test_tiles_count_as_operations(tiled):
    counts = []
    for grad in (True, False):
        qkv, table = torch.randn(2 * 6, 3 * 4), torch.randn(2, 3, 5)
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            attention.attend_runs(qkv, [(2, 2, 3)], table, 2, 0., False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 2 * 2 * 6 * 6 * 2
    assert len(tiled) == 1


def test_a_block_works_on_chunks_but_not_under_observation(monkeypatch):
    model, x = small(), noise(2, 3, 75, 90)
    monkeypatch.setattr(module, '_CHUNK', 12800)
    block = model.stages[0].blocks[0]
    maps = [2, 19, 23, 32]
    sizes = {'qkv': [], 'fc1': []}

    def fake(layer, x, act=None):
        for name, of in (('qkv', block.attn.qkv), ('fc1', block.mlp.fc1)):
            if layer is of:
                sizes[name].append(x.shape[:-1].numel())
        return layer(x) if act is None else act(layer(x))

    for room in (attention, blocks, module):
        monkeypatch.setattr(room, 'linear', fake)
    with torch.inference_mode():
        model(x)
        assert max(sizes['qkv'] + sizes['fc1']) <= 12800 / 32
        assert sum(sizes['qkv']) == sum(sizes['fc1']) == 2 * 19 * 23
        seen = []
        for layer in (block.norm2, block.mlp, block.mlp.fc2):
            layer.register_forward_hook(lambda *args: seen.append(args[-1].shape))
        block.attn.qkv.register_forward_pre_hook(lambda *args: seen.append(args[-1][0].shape))
        model(x)
    assert seen[0].numel() == 2 * 19 * 23 * 32
    assert list(seen[1]) == maps and len(seen) == 4


def test_chunks_leave_the_input_alone_and_respect_replacements(monkeypatch):
    monkeypatch.setattr(module, '_CHUNK', 1)
    model = small()
    block, x = model.stages[0].blocks[0], torch.randn(1, 4, 4, 32)  # one group: its tokens are in order
    before = x.clone()
    with torch.no_grad():
        plain = before + block.attn(block.norm1(before))
        torch.testing.assert_close(block(x), plain + block.mlp(block.norm2(plain)))
        assert torch.equal(x, before)
        block.attn = nn.Identity().eval()
        plain = before + block.norm1(before)
        torch.testing.assert_close(block(x), plain + block.mlp(block.norm2(plain)))
    model = small(drop_path_rate=0.9).train()
    with torch.no_grad():  # whole images are dropped, not tokens
        torch.manual_seed(0)
        block, x = model.stages[3].blocks[0], torch.randn(64, 2, 2, 96)
        kept = ((block(x) - x).flatten(1) != 0).float().mean(1)
    assert set(kept.tolist()) == {0., 1.}


@pytest.mark.parametrize('autocast, tolerance', [(False, 1e-10), (True, 2e-2)])
@pytest.mark.parametrize('rate', [0., 0.3, 0.8])
def test_dropped_images_are_left_out_without_a_trace(rate, autocast, tolerance, monkeypatch):
    results, tokens = [], []

    def counted(layer, x, act=None):
        tokens[-1] += x.shape[:-1].numel()
        return linear(layer, x, act)

    monkeypatch.setattr(attention, 'linear', counted)
    dtype = torch.float32 if autocast else torch.float64
    for observed in (True, False):
        model, x = small(drop_path_rate=rate).to(dtype).train(), noise(6, 3, 75, 90).to(dtype).requires_grad_()
        for block in model.modules() if observed else ():
            if isinstance(block, blocks.CrossFormerBlock):
                block.attn.register_forward_hook(lambda *args: None)
                block.mlp.register_forward_hook(lambda *args: None)
        torch.manual_seed(0)
        tokens.append(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            result = model(x)
        result.to(dtype).square().sum().backward()
        results.append([result, x.grad, *(p.grad for p in model.parameters())])
    assert tokens[0] == tokens[1] if rate == 0. else tokens[0] > tokens[1]
    for plain, fast in zip(*results, strict=True):
        assert plain.dtype == fast.dtype
        torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance * max(1., plain.abs().max().item()))


def test_every_parameter_has_a_gradient_if_all_images_are_dropped():
    block = small(drop_path_rate=0.9).train().stages[3].blocks[-1]
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1 - 1e-9
    x = torch.randn(2, 2, 2, 96)
    result = block(x)
    assert torch.equal(result, x)
    result.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_a_model_gives_the_same_either_way(calls):
    model, x = small(), noise(2, 3, 75, 90)
    with torch.inference_mode():
        fast = model(x)
        count = len(calls)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = copy.deepcopy(model)(x)
    assert count == 4 * 10 + 1 == len(calls)  # qkv, proj, fc1, fc2 of ten blocks; a convolution with many weights
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


IN_GRAPH = ['embed', 'block', 'attend']


def compiled(model):
    """Compile without code generation; return the calls of operators as well."""
    names = []

    def backend(graph, _):
        targets = [str(node.target).split('.') for node in graph.graph.nodes]
        names.extend(target[1] for target in targets if target[0] == 'timm_crossformer')
        return graph

    torch._dynamo.reset()
    return torch.compile(model, backend=aot_autograd(fw_compiler=backend), dynamic=True), names


@pytest.mark.parametrize('args', [{}, {'qkv_bias': False}, {'pos_bias': 'lucidrains'}], ids=str)
def test_a_graph_for_inference_holds_the_same_ways(args, monkeypatch):
    monkeypatch.setattr(module, '_CHUNK', 12800)
    model = small(depths=(2, 1, 1, 1), **args)
    graph, names = compiled(model)
    for size in ((75, 90), (64, 64)):
        x = noise(2, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    assert [names.count(name) for name in IN_GRAPH] == [4, 5, 0]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def double(parent, name):
    layer = Doubled(*reversed(getattr(parent, name).weight.shape))
    layer.load_state_dict(getattr(parent, name).state_dict())
    setattr(parent, name, layer)


def plus_one(_, __, out):
    return out + 1


CHANGES = {  # what makes a block another one than the operator computes
    'nothing': lambda block: None,
    'linear before attention': lambda block: double(block.attn, 'qkv'),
    'linear': lambda block: double(block.mlp, 'fc2'),
    'linear of the bias': lambda block: double(block.attn.pos_bias.mlp, '9'),
    'linear of the bias without its own': lambda block: setattr(block.attn.pos_bias.mlp[6], 'bias', None),
    'activation of the bias': lambda block: setattr(block.attn.pos_bias.mlp, '5', nn.Tanh()),
    'activation': lambda block: setattr(block.mlp, 'act', nn.GELU('tanh')),
    'norm': lambda block: setattr(block, 'norm2', nn.Identity()),
    'attention': lambda block: setattr(block, 'attn', nn.Identity()),
    'dropout': lambda block: setattr(block.mlp, 'drop1', nn.Tanh()),
    'forward': lambda block: setattr(block.attn, 'forward', lambda x: x + 1),
    'hook of attention': lambda block: block.attn.register_forward_hook(plus_one),
    'hook of a layer': lambda block: block.mlp.act.register_forward_hook(plus_one),
    'double': lambda block: block.double(),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_graph_follows_a_changed_block(change):
    block, x = small(depths=(1, 1, 1, 1)).stages[0].blocks[0], torch.randn(2, 9, 8, 32)
    CHANGES[change](block)
    x = x.to(block.norm1.weight.dtype)
    graph, names = compiled(block)
    with torch.inference_mode():
        expected = copy.deepcopy(block)(x)  # what the graph remembers is not to help
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)
    assert ('block' in names) == (change == 'nothing')


@pytest.mark.parametrize('change', [c for c in CHANGES if not c.startswith(('hook', 'forward'))])
def test_a_graph_follows_a_block_changed_later(change):
    block, x = small(depths=(1, 1, 1, 1)).stages[0].blocks[0], torch.randn(2, 9, 8, 32)
    graph, _ = compiled(block)
    with torch.inference_mode():
        graph(x)
        CHANGES[change](block)
        x = x.to(block.norm1.weight.dtype)
        torch.testing.assert_close(graph(x), copy.deepcopy(block)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('change', ['nothing', 'hook', 'norm', 'convolution', 'plain'])
def test_a_graph_follows_a_changed_embedding(change):
    model = small(depths=(1, 1, 1, 1), stage_norm=change != 'plain')
    for embed, x in ((model.stem, noise(2, 3, 65, 62)), (model.stages[1].downsample, torch.randn(2, 32, 9, 8))):
        if change == 'hook':
            embed.convs[1].register_forward_hook(plus_one)
        elif change == 'norm':
            embed.norm = nn.Tanh()
        elif change == 'convolution':
            embed.convs[1] = nn.Sequential(embed.convs[1], nn.Tanh())
        graph, names = compiled(embed)
        with torch.inference_mode():
            torch.testing.assert_close(graph(x), embed(x), rtol=1e-5, atol=1e-5)
        assert ('embed' in names) == (change in ('nothing', 'plain'))


def test_a_graph_follows_dropout_turned_on():
    block, x = small(depths=(1, 1, 1, 1), proj_drop_rate=0.5).stages[0].blocks[0], torch.randn(2, 9, 8, 32)
    graph, _ = compiled(block)
    with torch.inference_mode():
        assert torch.equal(graph(x), graph(x))
        block.mlp.drop2.train()
        assert not torch.equal(graph(x), graph(x))


def test_a_graph_follows_given_and_changed_weights():
    block, x = small(depths=(1, 1, 1, 1)).stages[3].blocks[0], torch.randn(1, 16, 16, 96)
    weights = {name: 1.5 * weight for name, weight in block.state_dict().items()}
    with torch.no_grad():
        graph, _ = compiled(lambda x: torch.func.functional_call(block, weights, x))
        torch.testing.assert_close(graph(x), torch.func.functional_call(block, weights, x), rtol=1e-5, atol=1e-5)
        graph, names = compiled(block)
        before = graph(x)
        assert names == ['block']
        for p in block.attn.pos_bias.parameters():  # its table is remembered
            p.data.normal_()
        assert not torch.allclose(graph(x), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(graph(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
def test_operators_keep_their_word(bias):
    """PyTorch's own checks: schema, shapes and strides of fake tensors, with sizes that change."""
    checks = ('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic')
    block = small(depths=(1, 1, 1, 1), qkv_bias=bias).stages[0].blocks[0].requires_grad_(False)
    args = block.attn.config()
    layers = block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.fc1, block.mlp.fc2
    layers = [layer.weight for layer in layers], [layer.bias for layer in layers], [1e-5, 1e-6]
    for height in (9, 5):  # several groups, or one: tokens in order
        x = torch.randn(2, height, 5, 32)
        torch.library.opcheck(blocks._block, (x, *layers, *args), test_utils=checks)
        torch.library.opcheck(attention._attend_opaque, (torch.randn(2, height, 5, 96), *args), test_utils=checks)
    convs = [nn.Conv2d(4, 8, kernel, stride=2, padding=(kernel - 2) // 2, bias=bias) for kernel in (2, 4)]
    weights = [conv.weight.detach() for conv in convs], [conv.bias.detach() if bias else None for conv in convs]
    for norm in ((None, None), (torch.rand(4), torch.rand(4) if bias else None)):
        args = torch.randn(2, 4, 7, 6), *weights, *norm, 1e-5, True, 2
        torch.library.opcheck(embedding._embed, args, test_utils=checks)


class _Mixing(nn.Module):
    """An MLP that looks at the whole map."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + x.mean((1, 2), keepdim=True)


@pytest.mark.parametrize('change', [
    lambda block: setattr(block, 'drop_path1', _Halved()),
    lambda block: setattr(block, 'drop_path2', _Halved()),
    lambda block: setattr(block.attn, 'proj_drop', _Halved()),
    lambda block: setattr(block, 'mlp', _Mixing(block.mlp)),
    lambda block: setattr(block, 'norm1', _Mixing(block.norm1)),
    lambda block: setattr(block.mlp, 'act', _Mixing(block.mlp.act)),
], ids=['drop_path1', 'drop_path2', 'proj_drop', 'mlp', 'norm1', 'act'])
def test_chunks_are_for_modules_that_treat_every_token_by_itself(change, monkeypatch):
    model, x = small(), noise(2, 3, 75, 90)
    for stage in model.stages:
        for block in stage.blocks:
            change(block)
    model.eval()
    expected = model(x)  # with gradients: as a whole
    monkeypatch.setattr(module, '_CHUNK', 1000)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class _Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize('change', [
    dict(padding_mode='circular'), dict(padding_mode='reflect'), dict(dilation=2), dict(groups=2), dict(padding=0),
    dict(stride=4), dict(kernel_size=(8, 2)),
], ids=str)
@pytest.mark.parametrize('channels', [2, 32])
def test_convolutions_of_another_kind_are_called_as_they_are(channels, change):
    conv = nn.Conv2d(**{**dict(
        in_channels=channels, out_channels=4, kernel_size=8, stride=2, padding=3), **change})
    x = noise(2, channels, 24, 40)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(module.strided_conv(conv, x, 2), conv(x), rtol=1e-5, atol=1e-5)
    model = small()
    assert embedding._is_known(model.stem)
    model.stem.convs[1] = conv
    assert not embedding._is_known(model.stem)


def test_an_empty_batch_is_no_error():
    for train in (True, False):
        model = small().train(train)
        assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 10)
        with torch.no_grad():
            assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 10)
