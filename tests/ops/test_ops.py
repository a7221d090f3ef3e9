"""Grouped attention: every backend against loops written from the definition, and the operator's promises."""
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from common import noise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from timm_crossformer.ops import choose_backend, cpu, grouped_attention, operator, reshape, triton

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


@pytest.mark.parametrize('extra', [0, 3])
@pytest.mark.parametrize('name', LAYOUTS)
def test_reshaping_alone_gives_the_same(name, extra):
    args = case(name, extra=extra)
    found, expected = (values_and_gradients(f, *args) for f in (reshape.grouped_attention, loops))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


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
        with FlopCounterMode(display=False) as counter:
            grouped_attention(qkv, *args).sum().backward()
        assert counter.get_total_flops() == forward + forward * 5 // 2


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
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    subprocess.run([sys.executable, '-c', script], env=env, check=True)


@pytest.mark.parametrize('grad', [False, True])
def test_no_image_at_all(grad):
    model = timm.create_model('test_crossformer', features_only=True)
    with torch.set_grad_enabled(grad):
        levels = model(torch.randn(0, 3, 64, 65))
    assert [tuple(level.shape) for level in levels] == [(0, 32, 16, 17), (0, 48, 8, 9), (0, 64, 4, 5), (0, 96, 2, 3)]
    if grad:
        sum(level.sum() for level in levels).backward()
        assert not any(p.grad.any() for p in model.parameters())
