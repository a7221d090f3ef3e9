"""What several test files share: variants, inputs, models that would show a fault."""
import itertools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import timm_crossformer  # noqa: F401  registers the models

GOLDEN = Path(__file__).parent / 'golden'
VARIANTS = sorted(timm.list_models(module='crossformer'))
OFFICIAL = [name for name in VARIANTS if name not in ('crossformer_lucidrains', 'test_crossformer')]
GROUPINGS = ('map', 'region', 'grid')

fakes_cuda = pytest.mark.skipif(
    torch.__version__.startswith(('2.7.', '2.8.', '2.9.')) and not torch.cuda.is_available(),
    reason='torch up to 2.9 asks the driver for the layout of fake CUDA tensors')


def noise(*shape, seed=0):
    """Return standard normal numbers that do not depend on torch's generator."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def lively(model):
    """Give every weight a size at which each part of the network moves the output, position biases above all."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=1. if 'pos_bias' in name else p[0].numel() ** -0.5, generator=generator)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + name.endswith('weight'))
    return model.eval()


def small(**kwargs):
    """Build the test model with lively weights."""
    return lively(timm.create_model('test_crossformer', **dict(dict(num_classes=10), **kwargs)))


def official_keys():
    """Return {'cls-VARIANT' or 'det-VARIANT': {official key: shape}}."""
    return json.loads((GOLDEN / 'official_keys.json').read_text())


def official_weights(entry, seed=0):
    """Rebuild the synthetic weights that the stored outputs were made with, under official names."""
    weights = {}
    for key, shape in official_keys()[entry].items():
        random = np.random.RandomState((zlib.crc32(key.encode()) + seed) & 0x7fffffff)
        value = random.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            value = value / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            value = value * np.float32(0.1) + np.float32(key.endswith('weight'))
        weights[key] = torch.from_numpy(value.astype(np.float32))
    return weights


def slow_axis_groups(n, size, interval, grouping):
    """Group 0..n-1 token by token, as the papers and the official code say it."""
    groups = {}
    if grouping == 'grid':
        interval = -(-n // size)
    for t in range(n):
        if grouping == 'sda':
            key = (t // size,)
        elif grouping == 'region':
            key = (t // (size * interval), t % interval)
        else:  # map: congruent modulo I; grid: row = member * I + phase
            key = (t % interval,)
        groups.setdefault(key, []).append(t)
    return list(groups.values())


def slow_groups(h, w, size, interval, grouping):
    """Group the tokens of a map, as sets of (row, column) lists in reading order."""
    if h <= size[0] or w <= size[1]:
        return {tuple(itertools.product(range(h), range(w)))}
    rows = slow_axis_groups(h, size[0], interval, grouping)
    cols = slow_axis_groups(w, size[1], interval, grouping)
    return {tuple(itertools.product(r, c)) for r in rows for c in cols}


def slow_attention(attn, x):
    """Weigh every pair of tokens of a map [1, H, W, C] by definition: [heads, H * W, H * W], a row for each query."""
    _, h, w, _ = x.shape
    q, k, _ = attn.qkv(x)[0].flatten(0, 1).unflatten(1, [3, attn.num_heads, -1]).unbind(1)  # H * W, heads, head_dim
    weights = torch.zeros(attn.num_heads, h * w, h * w)
    for group in slow_groups(h, w, attn.group_size, attn.interval, attn.grouping):
        tokens = torch.tensor([row * w + col for row, col in group])
        rows, cols = sorted({row for row, _ in group}), sorted({col for _, col in group})
        place = torch.tensor([(rows.index(row), cols.index(col)) for row, col in group])
        offset = place[:, None] - place  # query, key, (dy, dx)
        if attn.legacy_lookup:  # vit-pytorch looks up the entry of another offset
            gh, gw = attn.group_size
            entry = (offset[..., 0] + gh - 1) * (2 * gw - 1) + offset[..., 1] + gw - 1
            offset = torch.stack([entry // (2 * gw + 1) - gh, entry % (2 * gw + 1) - gw], dim=-1)
        scores = torch.einsum('qhd,khd->hqk', q[tokens], k[tokens]) * q.shape[-1] ** -0.5
        scores = scores + attn.pos_bias.mlp(offset.float()).permute(2, 0, 1)
        weights[:, tokens[:, None], tokens] = scores.softmax(dim=-1)
    return weights
