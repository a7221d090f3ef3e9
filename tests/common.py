"""What several test files share: variants, inputs, models that would show a fault."""
import json
import zlib
from pathlib import Path

import numpy as np
import timm
import torch

import timm_crossformer  # noqa: F401  registers the models

GOLDEN = Path(__file__).parent / 'golden'
VARIANTS = sorted(timm.list_models(module='crossformer'))
OFFICIAL = [name for name in VARIANTS if name not in ('crossformer_lucidrains', 'test_crossformer')]
GROUPINGS = ('map', 'region', 'grid')


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
