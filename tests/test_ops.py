"""Grouped attention: every backend against loops written from the definition, and the operator's promises."""
import os
import subprocess
import sys
from unittest import mock

import pytest
import timm
import torch
from common import GROUPINGS, fakes_cuda, noise, small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_crossformer.layers import parts
from timm_crossformer.layers.convolution import convolve
from timm_crossformer.ops import choose_backend, cpu, grouped_attention, operator, triton
from timm_crossformer.ops.grouping import map_layout

BACKENDS = ('reference', 'cpu')
LAYOUTS = {  # height, width, rows, cols
    'sda': (6, 8, (2, 3, 1), (2, 4, 1)),
    'sda with a remainder': (7, 5, (3, 3, 1), (2, 4, 1)),
    'region': (13, 9, (3, 3, 2), (2, 3, 2)),
    'region with fewer phases than the interval': (3, 9, (1, 2, 4), (3, 3, 1)),
    'map': (9, 10, (1, 3, 3), (1, 5, 2)),
    'grid': (5, 9, (1, 4, 2), (1, 4, 3)),
    'whole': (4, 7, (1, 4, 1), (1, 7, 1)),
    'strip': (1, 11, (1, 1, 1), (3, 4, 1)),
    'one token': (1, 1, (1, 1, 1), (1, 1, 1)),
    'more groups than tokens': (4, 3, (3, 3, 1), (2, 2, 2)),
}


def loops(qkv, table, heads, rows, cols):
    """Attend token by token, in fp64: two tokens share a group if region and phase agree on both axes."""
    B, H, W, C = qkv.shape
    q, k, v = qkv.double().view(B, H, W, 3, heads, -1).unbind(3)

    def place(n, layout):
        _, size, interval = layout
        region, rest = divmod(n, size * interval)
        return (region, rest % interval), rest // interval  # group, member

    out = []
    for y in range(H):
        for x in range(W):
            scores, values = [], []
            for ky in range(H):
                for kx in range(W):
                    (gy, my), (gx, mx) = place(y, rows), place(x, cols)
                    (hy, ny), (hx, nx) = place(ky, rows), place(kx, cols)
                    if gy == hy and gx == hx:
                        bias = table.double()[:, table.shape[1] // 2 + my - ny, table.shape[2] // 2 + mx - nx]
                        scores.append((q[:, y, x] * k[:, ky, kx]).sum(-1) * q.shape[-1] ** -0.5 + bias)
                        values.append(v[:, ky, kx])
            weights = torch.stack(scores).softmax(0)
            out.append((weights[..., None] * torch.stack(values)).sum(0).flatten(1))
    return torch.stack(out, dim=1).view(B, H, W, C // 3)


def case(name, heads=2, biases=2, dim=8, extra=0, dtype=torch.float32):
    height, width, rows, cols = LAYOUTS[name]
    qkv = noise(2, height, width, 3 * heads * dim).to(dtype).requires_grad_()
    table = noise(biases, 2 * (rows[1] + extra) - 1, 2 * (cols[1] + extra) - 1, seed=1).to(dtype).requires_grad_()
    return qkv, table, heads, rows, cols


def values_and_gradients(attend, qkv, table, *args):
    out = attend(qkv, table, *args)
    return out, *torch.autograd.grad(out.sin().sum(), [qkv, table])


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('biases', 'extra'), [(2, 0), (1, 0), (2, 2)], ids=['heads', 'one head', 'larger table'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_values_and_gradients_are_those_of_the_loops(name, biases, extra, backend):
    args = case(name, biases=biases, extra=extra)
    expected = values_and_gradients(loops, *args)
    found = values_and_gradients(lambda *args: grouped_attention(*args, backend=backend), *args)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('many', [1, 512], ids=['tiles', 'whole groups'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_ways_of_the_cpu_backend_agree(name, many, threads, monkeypatch):
    monkeypatch.setattr(cpu, '_TILE', 30)
    torch.set_num_threads(threads)  # with several, small groups go through plain products
    args = case(name)
    with torch.no_grad():
        expected = grouped_attention(*args, backend='reference')
        torch.testing.assert_close(cpu.forward(*args, many), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('many', [1, 512], ids=['tiles', 'whole groups'])
def test_precisions(dtype, many):
    args = case('region', dtype=dtype)
    expected = loops(*args)
    with torch.no_grad():
        out = cpu.forward(*args, many)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)
    grads = torch.autograd.grad(grouped_attention(*args).sum(), args[:2])
    assert [g.dtype for g in grads] == [dtype, dtype]


def test_a_batch_of_no_images():
    for backend in BACKENDS:
        qkv = torch.zeros(0, 5, 6, 24, requires_grad=True)
        table = torch.zeros(1, 5, 5, requires_grad=True)
        out = grouped_attention(qkv, table, 1, (2, 3, 1), (2, 3, 1), backend=backend)
        assert out.shape == (0, 5, 6, 8)
        assert not torch.autograd.grad(out.sum(), table)[0].any()


def test_gradients_are_those_of_finite_differences_twice():
    name = 'region with fewer phases than the interval'
    qkv, table, *args = case(name, heads=1, biases=1, dim=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, t: grouped_attention(q, t, *args), (qkv, table))
    assert torch.autograd.gradgradcheck(lambda q: grouped_attention(q, table, *args).sum(-1), (qkv,))


@pytest.mark.filterwarnings('ignore:The .grad attribute')  # of opcheck's own copies
@pytest.mark.parametrize('name', ['region', 'map', 'whole'])
def test_the_operator_keeps_its_word(name):
    """PyTorch's own checks: schema, fake tensors, gradients, sizes that change."""
    qkv, table, heads, rows, cols = case(name)
    args = qkv, table, heads, list(rows), list(cols), 'cpu'
    torch.library.opcheck(torch.ops.timm_crossformer.grouped_attention.default, args)
    args = qkv, table, heads, list(rows), list(cols), 'triton', True  # which the reference serves on a CPU
    torch.library.opcheck(torch.ops.timm_crossformer.grouped_attention.default, args)
    out, logsumexp = (x.detach() for x in torch.ops.timm_crossformer.grouped_attention(*args))
    args = torch.randn_like(out), qkv.detach(), table.detach(), out, logsumexp, *args[2:-1]
    torch.library.opcheck(torch.ops.timm_crossformer.grouped_attention_backward.default, args)


def test_flops_are_counted_on_tokens_that_exist():
    for name, pairs in (('whole', 28 ** 2), ('sda with a remainder', (3 ** 2 + 3 ** 2 + 1) * (4 ** 2 + 1))):
        qkv, *args = case(name)
        forward = 2 * 2 * 2 * pairs * 16  # two products of images, pairs and channels
        for attend, backward in ((grouped_attention, 4), (lambda *args: operator._operator(*args, 'cpu')[0], 5)):
            with FlopCounterMode(display=False) as counter:  # the first shows its products, the second is one operator
                attend(qkv, *args).sum().backward()
            assert counter.get_total_flops() == forward + forward * backward // 2


@pytest.mark.parametrize(('change', 'message'), [
    (dict(qkv=torch.zeros(4, 4, 24)), '`qkv` needs shape [B, H, W, 3 * C]'),
    (dict(qkv=torch.zeros(1, 0, 4, 24)), 'with at least one token, got [1, 0, 4, 24]'),
    (dict(qkv=torch.zeros(1, 4, 4, 25)), 'needs to be 3 * heads * channels per head, got 25 with num_heads=2'),
    (dict(num_heads=0), 'with num_heads=0'),
    (dict(qkv=torch.zeros(1, 4, 4, 24, dtype=torch.int64)), 'need a floating point dtype, got torch.int64'),
    (dict(table=torch.zeros(3, 3, 3)), '`table` needs shape [2 or 1, 2 * TH - 1, 2 * TW - 1], got [3, 3, 3]'),
    (dict(table=torch.zeros(2, 4, 3)), '`table` needs shape'),
    (dict(table=torch.zeros(2, 1, 3)), '`table` needs 2 * 2 - 1 offsets for the groups of `rows`, got 1'),
    (dict(rows=(1, 2, 1)), '`rows` needs to cover the map: regions * size * interval of (1, 2, 1) is 2, less than 4'),
    (dict(cols=(0, 2, 1)), '`cols` needs (regions, size, interval), each from 1 up, got (0, 2, 1)'),
    (dict(backend='cuda'), "`backend` is one of reference, cpu, triton, got 'cuda'"),
    (dict(backend='triton'), "Backend 'triton' needs"),
], ids=lambda v: str(v)[:40])
def test_wrong_arguments(change, message):
    args = dict(qkv=torch.zeros(1, 4, 4, 24), table=torch.zeros(2, 3, 3), num_heads=2, rows=(2, 2, 1), cols=(2, 2, 1))
    with pytest.raises(ValueError) as e:
        grouped_attention(**{**args, **change})
    assert message in str(e.value)


def test_the_backend_is_chosen_by_device_dtype_and_shape():
    with FakeTensorMode():
        def choose(device, dtype=torch.float32, channels=96):
            return choose_backend(torch.empty(1, 4, 4, channels, device=device, dtype=dtype), 1)

        assert choose('cpu') == choose('cpu', torch.float64) == 'cpu'
        assert choose('meta') == 'reference'
        assert choose('cuda') == choose('cuda', torch.bfloat16) == ('triton' if triton.is_installed() else 'reference')
        assert choose('cuda', torch.float64) == choose('cuda', channels=3 * 256) == 'reference'


def test_the_environment_forces_a_backend(monkeypatch):
    args = case('region')
    for forced in ('reference', 'cpu'):
        monkeypatch.setenv('TIMM_CROSSFORMER_ATTENTION', forced)
        attend = operator.reference.grouped_attention
        with mock.patch.object(operator.reference, 'grouped_attention', wraps=attend) as called:
            grouped_attention(*args)
        assert called.called == (forced == 'reference')
    monkeypatch.setenv('TIMM_CROSSFORMER_ATTENTION', 'none')
    with pytest.raises(ValueError, match=r"got 'none'\. Leave it out, or unset TIMM_CROSSFORMER_ATTENTION"):
        grouped_attention(*args)


@pytest.mark.skipif(not triton.is_installed(), reason='needs Triton')
@pytest.mark.slow
def test_the_kernel_serves_the_operator_in_the_interpreter():
    script = (
        'import torch; from test_ops import LAYOUTS, case, grouped_attention, values_and_gradients\n'
        'for name in LAYOUTS:\n'
        '    a, b = (values_and_gradients(lambda *x: grouped_attention(*x, backend=w), *case(name, dim=16))'
        ' for w in ("triton", "reference"))\n'
        '    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)\n')
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.path.dirname(__file__)}
    subprocess.run([sys.executable, '-c', script], env=env, check=True)


class Launches(TorchDispatchMode):
    """Count operators that launch work on many numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = func.is_view or 'view' in str(func)
        results = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        self.count += not view and any(t.numel() >= 20_000 for t in results)
        return out


@pytest.mark.skipif(not triton.is_installed(), reason='needs Triton')
@fakes_cuda
@pytest.mark.parametrize(('variant', 'most'), [
    ('crossformer_small', 165), ('crossformer_pp_small', 320), ('crossformer_base', 300)])
def test_a_block_on_cuda_is_ten_launches_at_every_size(variant, most):
    model = timm.create_model(variant, num_classes=0).eval()
    with FakeTensorMode(), torch.no_grad():
        model._apply(lambda t: torch.empty(t.shape, dtype=torch.bfloat16, device='cuda'))
        for size in ((224, 224), (256, 256), (320, 320), (800, 1344)):
            if size == (800, 1344):
                model.set_input_size(lda_grouping='region')
            with Launches() as launches:
                model(torch.empty(1, 3, *size, dtype=torch.bfloat16, device='cuda'))
            assert 100 < launches.count <= most


# ---- wide maps in parts


@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('part', [1, 1000, 20_000])
def test_parts_give_the_same(part, grouping, monkeypatch):
    model, x = small(lda_grouping=grouping, cooling=True), noise(3, 3, 75, 190)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(parts, '_PART', part)
        with mock.patch('timm_crossformer.model.add_in_parts', wraps=parts.add_in_parts) as used:
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert used.call_count >= 1


def test_parts_are_whole_groups_and_every_token_once():
    for grouping in ('sda', *GROUPINGS):
        rows, cols = map_layout(23, 37, (3, 4), 3, grouping)
        with mock.patch.object(parts, '_PART', 40):
            seen = torch.zeros(2, 23, 37, 1)
            for place, part_rows, part_cols in parts.parts(seen, rows, cols):
                seen[place] += 1
                assert part_rows[0] * part_rows[1] * part_rows[2] >= seen[place].shape[1]
                assert part_cols[0] * part_cols[1] * part_cols[2] >= seen[place].shape[2]
        assert (seen == 1).all()


class Mixing(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean((1, 2), keepdim=True)


CHANGES = {
    'mlp replaced': lambda block: setattr(block, 'mlp', Mixing(block.mlp)),
    'norm replaced': lambda block: setattr(block, 'norm1', Mixing(block.norm1)),
    'forward patched': lambda block: setattr(block.mlp, 'forward', Mixing(block.mlp.fc1).inner.forward),
    'hook': lambda block: block.mlp.fc1.register_forward_hook(lambda *args: None),
    'pre-hook': lambda block: block.attn.pos_bias.mlp[3].register_forward_pre_hook(lambda *args: None),
    'training': lambda block: block.attn.attn_drop.train(),
    'block in training': lambda block: setattr(block, 'training', True),
    'hook of the block': lambda block: block.register_forward_hook(lambda *args: None),
    'forward of the block': lambda block: setattr(block, 'forward', torch.zeros_like),
}


@pytest.mark.parametrize('change', CHANGES)
def test_whoever_replaces_or_watches_a_layer_gets_the_whole_map(change, monkeypatch):
    monkeypatch.setattr(parts, '_PART', 1)
    blocks, x = small().stages[0].blocks, torch.randn(1, 9, 8, 32)
    with torch.no_grad():
        assert parts.goes_in_parts(blocks, x)
        CHANGES[change](blocks[1])
        assert not parts.goes_in_parts(blocks, x)
    blocks = small().stages[0].blocks
    assert not parts.goes_in_parts(blocks, x)  # gradients
    blocks.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        assert not parts.goes_in_parts(blocks, x)


# ---- convolutions


@pytest.mark.parametrize('grad', [False, True])
def test_no_image_at_all(grad):
    model = timm.create_model('test_crossformer', features_only=True)
    with torch.set_grad_enabled(grad):
        levels = model(torch.randn(0, 3, 64, 65))
    assert [tuple(level.shape) for level in levels] == [(0, 32, 16, 17), (0, 48, 8, 9), (0, 64, 4, 5), (0, 96, 2, 3)]
    if grad:
        sum(level.sum() for level in levels).backward()
        assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('kernel', [4, 8, 16, 32])
def test_a_convolution_by_blocks_gives_the_same(kernel):
    conv = torch.nn.Conv2d(3, 5, kernel, stride=4, padding=(kernel - 4) // 2)
    x = noise(2, 3, 24, 36).requires_grad_()
    wanted = [x, *conv.parameters()]
    expected, out = conv(x), convolve(conv, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert out.grad_fn.next_functions[1][0].name() == 'PixelUnshuffleBackward0'


@pytest.mark.parametrize('change', [
    {}, dict(padding_mode='circular'), dict(dilation=2), dict(groups=2), dict(padding=0), dict(kernel_size=(8, 2)),
    dict(stride=(2, 1)),
], ids=str)
@pytest.mark.parametrize('channels', [2, 32])
@pytest.mark.parametrize('size', [(24, 40), (2, 4)], ids=str)
def test_convolutions_of_every_kind_are_what_they_say(channels, change, size):
    args = {**dict(in_channels=channels, out_channels=64, kernel_size=8, stride=2, padding=3), **change}
    conv = torch.nn.Conv2d(**args)
    if size == (2, 4) and (args['padding'] != 3 or {'dilation', 'padding_mode'} & set(change)):
        pytest.skip('the kernel is larger than the map')
    x = noise(2, channels, *size)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(convolve(conv, x), conv(x), rtol=1e-4, atol=1e-4)
