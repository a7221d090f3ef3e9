"""Outputs of the official code, for synthetic weights under official names (tests/golden)."""
import json

import numpy as np
import pytest
import timm
import torch
from common import GOLDEN, noise, official_weights
from safetensors.torch import load_file

CASES = json.loads((GOLDEN / 'cases.json').read_text())
TOLERANCE = 1e-4  # of the standard deviation of what is compared
# The classifier and the dense code since 2023 group by regions, the first dense code over the whole map.
GROUPING = {'cls': 'region', 'det': 'region', 'paper': 'map'}
OURS = {'crs_interval': 'interval', 'group_size': 'group_size'}
HEAVY = ('base', 'large', 'huge')


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN / 'golden.safetensors')


def build(case, **kwargs):
    args = {OURS[name]: value for name, value in case['overrides'].items()}
    model = timm.create_model(case['variant'], lda_grouping=GROUPING[case['kind']], **args, **kwargs)
    entry = ('cls-' if case['kind'] == 'cls' else 'det-') + case['variant']
    model.load_state_dict(official_weights(entry, case['weight_seed']), strict=case['kind'] == 'cls')
    return model.eval()


def image(case):
    return noise(case['batch'], 3, case['height'], case['width'], seed=case['input_seed'])


@pytest.mark.parametrize('case', [
    pytest.param(case, id=case['id'], marks=[pytest.mark.slow] if case['variant'].endswith(HEAVY) else [])
    for case in CASES
])
def test_outputs_of_the_official_code(case, golden):
    with torch.inference_mode():
        if case['kind'] == 'cls':
            results = {'logits': build(case)(image(case))}
        else:
            maps = build(case).forward_intermediates(image(case), intermediates_only=True)
            assert [list(m.shape) for m in maps] == case['shapes']
            picks = [np.random.RandomState(7).randint(0, m.numel(), 512) for m in maps]
            results = {f'stage{i}': m.flatten()[pick] for i, (m, pick) in enumerate(zip(maps, picks, strict=True))}
    for name, result in results.items():
        expected = golden[f'{case["id"]}/{name}']
        assert (result - expected).abs().max() < TOLERANCE * expected.std(), name


@pytest.mark.parametrize('grouping', ['map', 'region', 'grid'])
def test_all_groupings_agree_at_224(grouping, golden):
    case = next(c for c in CASES if c['id'] == 'cls-crossformer_small-224x224')
    model = build(case)
    model.set_input_size(lda_grouping=grouping)
    with torch.inference_mode():
        logits = model(image(case))
    expected = golden[case['id'] + '/logits']
    assert (logits - expected).abs().max() < TOLERANCE * expected.std()


def test_groupings_differ_beyond_224():
    case = next(c for c in CASES if c['id'] == 'paper-crossformer_small-320x480')
    model, x = build(case), image(case)
    outputs = []
    for grouping in ('map', 'region', 'grid'):
        model.set_input_size(lda_grouping=grouping)
        with torch.inference_mode():
            outputs.append(model.forward_intermediates(x, intermediates_only=True)[-1])
    for i in range(3):
        assert (outputs[i] - outputs[i - 1]).abs().max() > 0.1 * outputs[i].std()


def test_features_only_and_files_load_the_same_weights(golden, tmp_path):
    case = next(c for c in CASES if c['id'] == 'det-crossformer_tiny-224x224')
    weights = official_weights('det-crossformer_tiny', case['weight_seed'])
    path = tmp_path / 'official.pth'
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in weights.items()}, 'meta': {}}, path)
    model = timm.create_model(
        'crossformer_tiny', pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    with torch.inference_mode():
        maps = model(image(case))
    for i, m in enumerate(maps):
        pick = np.random.RandomState(7).randint(0, m.numel(), 512)
        expected = golden[f'{case["id"]}/stage{i}']
        assert (m.flatten()[pick] - expected).abs().max() < TOLERANCE * expected.std()


def test_checkpoint_path_loads_an_official_file(golden, tmp_path):
    case = next(c for c in CASES if c['id'] == 'cls-crossformer_tiny-128x128')
    path = tmp_path / 'official.pth'
    torch.save({'model': official_weights('cls-crossformer_tiny', case['weight_seed']), 'epoch': 299}, path)
    model = timm.create_model('crossformer_tiny', checkpoint_path=str(path)).eval()
    with torch.inference_mode():
        logits = model(image(case))
    expected = golden[case['id'] + '/logits']
    assert (logits - expected).abs().max() < TOLERANCE * expected.std()
