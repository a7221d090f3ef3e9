"""Cases of the Triton kernels beside an oracle written from the definition; as a script, all cases in the interpreter.

Triton decides at its import whether kernels are interpreted, so that needs a process of its own:

    TRITON_INTERPRET=1 python tests/ops/triton_cases.py
"""
import json
import random
from typing import NamedTuple, Tuple
from unittest import mock

import torch

from timm_crossformer.ops import triton as ops
from timm_crossformer.ops.reference import attention_and_logsumexp


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


CASES = {  # none in bf16, whose products the interpreter takes of the bits as whole numbers
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
    'head-dim-48': Case(1, 10, 13, (2, 5, 1), (2, 7, 1), heads=1, head_dim=48),
    'head-dim-96-large-groups': Case(1, 9, 8, (1, 9, 1), (1, 8, 1), heads=1, head_dim=96),
    'head-dim-128-large-groups': Case(1, 9, 5, (1, 9, 1), (1, 5, 1), heads=1, head_dim=128),
    '4x4-groups': Case(3, 16, 13, (1, 4, 4), (1, 4, 4)),
    '7x7-groups-of-many-images': Case(5, 11, 9, (1, 6, 2), (1, 5, 2), heads=1),
    '14x14-groups': Case(1, 17, 14, (2, 14, 1), (1, 14, 1), heads=1),
    '14x14-groups-of-an-interval': Case(2, 27, 14, (1, 14, 2), (1, 14, 1), heads=1, dtype=torch.float16),
    '8x16-groups': Case(1, 9, 17, (2, 8, 1), (2, 16, 1), heads=3, head_dim=8, table_heads=1),
    'fp16': Case(2, 9, 7, (2, 3, 2), (2, 3, 2), dtype=torch.float16),
    'fp16-large-groups': Case(1, 9, 8, (1, 9, 1), (1, 8, 1), dtype=torch.float16),
}
RANDOM = 6  # cases
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
    """Compare values and gradients with the oracle; work that is shared out otherwise gives the same bits."""
    qkv, table, grad = inputs(case, device)
    given = case.heads, case.rows, case.cols
    out, logsumexp = ops.forward(qkv, table, *given, save=True)
    grads = ops.backward(grad, qkv, table, out, logsumexp, *given)
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
    _, expected = attention_and_logsumexp(qkv.cpu().double(), table.cpu().double(), *given)
    torch.testing.assert_close(logsumexp.cpu(), expected, atol=10 * TOLERANCES[case.dtype], rtol=1e-4)
    again, nothing = ops.forward(qkv, table, *given, processors=5)
    assert torch.equal(again, out) and nothing.numel() == 0


def random_case(seed):
    """Draw any case that the operator takes, small enough for the interpreter."""
    draw = random.Random(seed)
    height, width = draw.randint(1, 17), draw.randint(1, 17)

    def layout(n):
        size, interval = draw.randint(1, 10), draw.randint(1, 5)
        return -(-n // (size * interval)) + (draw.random() < 0.2), size, interval

    heads = draw.choice([1, 2])
    return Case(
        draw.choice([1, 1, 2]), height, width, layout(height), layout(width), heads,
        draw.choice([1, 8, 16, 17, 24, 32, 40, 64]), draw.choice([0, 1]), (draw.randint(0, 2), draw.randint(0, 2)),
        draw.choice([torch.float32, torch.float32, torch.float16]))


def check_find_fault():
    """Right kernels have no fault in any variant; beside a wrong reference, whatever is wrong is named."""
    device, seen = torch.device('cpu'), set()
    for backward in (False, True):
        for dtype in (torch.float32, torch.float16):
            for members in (9, 30, 49, 81, 196, 1050):
                variant = ops.variant(dtype, 32, members, backward, False)
                if (variant, backward) not in seen:
                    seen.add((variant, backward))
                    assert ops.find_fault(device, dtype, 32, variant, backward) is None, (dtype, members, backward)
    assert len(seen) >= 16

    def wrong(qkv, table, *given):
        return attention(qkv, 2 * table, *given)

    attention, backward = ops.reference.grouped_attention, ops.cpu.backward
    variant = ops.variant(torch.float16, 8, 49, False, False)
    assert ops.find_fault(device, torch.float16, 8, variant, False, wrong).startswith('result is off by')
    with mock.patch.object(ops.cpu, 'backward', lambda *args: [2 * x for x in backward(*args)]):
        variant = ops.variant(torch.float16, 8, 49, True, False)
        assert ops.find_fault(device, torch.float16, 8, variant, True).startswith('grad_qkv is off by')
    variant = ops.variant(torch.float32, 8, 1050, True, False)
    with mock.patch.object(ops.cpu, 'backward', lambda *args: [backward(*args)[0], -backward(*args)[1]]):
        assert ops.find_fault(device, torch.float32, 8, variant, True).startswith('grad_table is off by')


def main():
    """Print what failed, by name of the case, as JSON."""
    torch.set_num_threads(1)
    failed = {}
    checks = [(name, check_attention, (case,)) for name, case in CASES.items()]
    checks += [(f'random-{seed}', check_attention, (random_case(seed),)) for seed in range(RANDOM)]
    checks += [('find-fault', check_find_fault, ())]
    for name, check, given in checks:
        try:
            check(*given)
        except Exception as error:
            failed[name] = f'{type(error).__name__}: {error}'
    print(json.dumps(failed))


if __name__ == '__main__':
    main()
