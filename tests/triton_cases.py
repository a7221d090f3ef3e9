"""Cases of the Triton kernels beside an oracle written from the definition; as a script, all cases in the interpreter.

Triton decides at its import whether kernels are interpreted, so that needs a process of its own:

    TRITON_INTERPRET=1 python tests/triton_cases.py
"""
import json
import math
from typing import NamedTuple, Tuple

import torch
from torch import nn

from timm_crossformer.ops import triton as ops


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    rows: Tuple[int, int, int]  # regions, size, interval
    cols: Tuple[int, int, int]
    heads: int = 2
    head_dim: int = 16
    table_heads: int = 0  # as many as heads
    spare: Tuple[int, int] = (0, 0)  # what the table has beyond the size of a group
    dtype: torch.dtype = torch.float32


CASES = {
    'sda': Case(2, 8, 12, (2, 4, 1), (3, 4, 1)),
    'sda-7x7': Case(1, 7, 14, (1, 7, 1), (2, 7, 1), head_dim=32),
    'sda-remainder': Case(2, 9, 7, (3, 4, 1), (2, 4, 1)),
    'region': Case(1, 8, 8, (2, 2, 2), (2, 2, 2)),
    'region-remainder': Case(2, 9, 7, (2, 3, 2), (2, 3, 2), head_dim=24),
    'region-empty-groups': Case(1, 13, 5, (2, 3, 4), (1, 3, 4)),
    'map': Case(1, 12, 10, (1, 3, 4), (1, 3, 4)),
    'map-remainder': Case(2, 11, 13, (1, 3, 4), (1, 4, 4)),
    'grid': Case(1, 9, 13, (1, 3, 3), (1, 5, 3)),
    'grid-empty-groups': Case(1, 5, 7, (1, 4, 7), (1, 4, 9)),
    'rows-unlike-cols': Case(2, 6, 10, (2, 3, 1), (1, 3, 4), heads=3),
    'strip-one-high': Case(2, 1, 20, (1, 1, 1), (3, 7, 1)),
    'strip-one-wide': Case(1, 9, 1, (1, 5, 2), (1, 4, 3)),
    'one-token': Case(3, 1, 1, (1, 1, 1), (1, 1, 1)),
    'one-token-of-large-groups': Case(1, 1, 1, (1, 7, 8), (1, 7, 8)),
    'whole-map': Case(1, 9, 11, (1, 9, 1), (1, 11, 1)),
    'whole-map-bands': Case(2, 5, 29, (1, 5, 1), (1, 29, 1), heads=1),
    'large-groups-remainder': Case(1, 17, 19, (1, 9, 2), (1, 10, 2)),
    'large-region-empty-groups': Case(1, 13, 11, (2, 9, 1), (2, 5, 2), heads=1),
    'batch-0': Case(0, 8, 8, (2, 4, 1), (2, 4, 1)),
    'height-0': Case(1, 0, 8, (0, 4, 1), (2, 4, 1)),
    'one-head-table': Case(2, 6, 6, (2, 3, 1), (2, 3, 1), heads=3, table_heads=1),
    'one-head-table-large-groups': Case(1, 9, 8, (1, 9, 1), (1, 8, 1), table_heads=1),
    'spare-table': Case(1, 9, 7, (2, 3, 2), (2, 3, 2), spare=(2, 3)),
    'spare-table-large-groups': Case(1, 9, 8, (1, 9, 1), (1, 8, 1), spare=(1, 3)),
    'head-dim-8': Case(1, 4, 6, (1, 4, 1), (2, 3, 1), head_dim=8),
    'head-dim-24-large-groups': Case(1, 10, 7, (1, 10, 1), (1, 7, 1), head_dim=24),
    'head-dim-32': Case(1, 5, 6, (1, 5, 1), (1, 6, 1), head_dim=32),
    'head-dim-64': Case(1, 8, 6, (1, 8, 1), (1, 6, 1), head_dim=64),
    'head-dim-128': Case(1, 6, 6, (2, 3, 2), (2, 3, 2), heads=1, head_dim=128),
    'fp16': Case(2, 9, 7, (2, 3, 2), (2, 3, 2), dtype=torch.float16),
    'fp16-large-groups': Case(1, 9, 8, (1, 9, 1), (1, 8, 1), dtype=torch.float16),
}
TABLES = {  # height, width, width of the MLP, heads
    'paper': (7, 7, 6, 3),
    'paper-large': (5, 9, 48, 12),
    'narrow': (1, 6, 1, 1),
    'one-offset': (1, 1, 16, 2),
    'widest': (3, 4, 64, 32),
}
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def oracle(qkv, table, num_heads, rows, cols):
    """Attend group by group, in fp64 and in the words of the definition."""
    B, H, W, C = qkv.shape
    qkv = qkv.double().view(B, H, W, 3, num_heads, C // 3 // num_heads)
    table = table.double().expand(num_heads, -1, -1)
    centre_h, centre_w = table.shape[1] // 2, table.shape[2] // 2
    out = {}
    for row_members in groups_of_axis(H, rows):
        for col_members in groups_of_axis(W, cols):
            tokens = [(i, j) for i in range(len(row_members)) for j in range(len(col_members))]
            row, col = [row_members[i] for i, _ in tokens], [col_members[j] for _, j in tokens]
            q, k, v = qkv[:, row, col].permute(2, 0, 3, 1, 4)  # B, heads, tokens, head_dim
            dy = [[query[0] - key[0] + centre_h for key in tokens] for query in tokens]
            dx = [[query[1] - key[1] + centre_w for key in tokens] for query in tokens]
            scores = q @ k.mT * q.shape[-1] ** -0.5 + table[:, dy, dx]
            result = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            out.update({token: result[:, i] for i, token in enumerate(zip(row, col, strict=True))})
    assert len(out) == H * W
    return torch.stack([out[i, j] for i in range(H) for j in range(W)], 1).view(B, H, W, C // 3)


def groups_of_axis(n, layout):
    """List the existing tokens of every group with at least one of them."""
    regions, size, interval = layout
    groups = [
        [region * size * interval + member * interval + phase for member in range(size)]
        for region in range(regions) for phase in range(interval)
    ]
    groups = [[token for token in group if token < n] for group in groups]
    return [group for group in groups if group]


def inputs(case, device='cpu'):
    """Return queries, keys and values, a table in fp32, and a gradient that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    channels = case.heads * case.head_dim
    qkv = torch.randn(case.batch, case.height, case.width, 3 * channels, generator=generator)
    table_h, table_w = case.rows[1] + case.spare[0], case.cols[1] + case.spare[1]
    table = torch.randn(case.table_heads or case.heads, 2 * table_h - 1, 2 * table_w - 1, generator=generator)
    grad = torch.randn(case.batch, case.width, case.height, channels, generator=generator).transpose(1, 2)
    return qkv.to(device, case.dtype), table.to(device), grad.to(device, case.dtype)


def check_attention(case, device='cpu'):
    """Compare values and gradients with the oracle."""
    qkv, table, grad = inputs(case, device)
    given = case.heads, case.rows, case.cols
    out = ops.forward(qkv, table, *given)
    grads = ops.backward(grad, qkv, table, *given)
    for result, like in zip([out, *grads], [grad, qkv, table], strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype and result.is_contiguous()
    if qkv.numel() == 0:
        assert not grads[1].any()
        return
    leaves = [qkv.cpu().double().requires_grad_(), table.cpu().double().requires_grad_()]
    expected = oracle(*leaves, *given)
    expected_grads = torch.autograd.grad(expected, leaves, grad.cpu().double())
    for name, got, want in zip(
            ['out', 'grad_qkv', 'grad_table'], [out, *grads], [expected.detach(), *expected_grads], strict=True):
        tolerance = TOLERANCES[case.dtype] * max(1., float(want.abs().max()))
        torch.testing.assert_close(
            got.cpu().double(), want, atol=tolerance, rtol=0, msg=lambda text, name=name: f'{name}: {text}')


def check_table(height, width, dim, heads, device='cpu', dtype=torch.float32):
    """Compare a table of biases with that of an MLP built of PyTorch's layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2, dim)]
        for i, outputs in enumerate([dim, dim, heads]):
            norm = nn.LayerNorm(dim, eps=10. ** -(5 + i))
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            layers += [norm, nn.ReLU(), nn.Linear(dim, outputs)]
    mlp = nn.Sequential(*layers).to(device, dtype)
    parameters = list(mlp.parameters())
    eps = [layer.eps for layer in mlp if isinstance(layer, nn.LayerNorm)]
    dy = torch.arange(1 - height, height)[:, None].expand(-1, 2 * width - 1)
    offsets = torch.stack([dy, torch.arange(1 - width, width).expand_as(dy)], -1).to(device)
    with torch.no_grad():
        got = ops.position_table(offsets, parameters, eps)
        want = mlp.double()(offsets.double()).permute(2, 0, 1)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=TOLERANCES[dtype] * (1 + math.sqrt(dim)), rtol=0)


def check_find_fault():
    """A right kernel has no fault; beside a wrong reference, whatever is wrong is named."""
    def reference(qkv, table, *given):
        return oracle(qkv, table, *given).to(qkv.dtype)

    device = torch.device('cpu')
    assert ops.find_fault(device, reference) is None
    fault = ops.find_fault(device, lambda qkv, table, *given: reference(qkv, 2 * table, *given))
    assert fault.startswith('result in torch.float32 is off by')
    fault = ops.find_fault(device, lambda qkv, table, *given: reference(qkv, table.detach() + 0 * table, *given))
    assert fault.startswith('grad_table in torch.float32 is off by')


def main():
    """Print what failed, by name of the case, as JSON."""
    torch.set_num_threads(1)
    failed = {}
    checks = [(name, check_attention, (case,)) for name, case in CASES.items()]
    checks += [(f'table-{name}', check_table, sizes) for name, sizes in TABLES.items()]
    checks += [('find-fault', check_find_fault, ())]
    for name, check, given in checks:
        try:
            check(*given)
        except Exception as error:
            failed[name] = f'{type(error).__name__}: {error}'
    print(json.dumps(failed))


if __name__ == '__main__':
    main()
