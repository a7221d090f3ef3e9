"""Checkpoints of every origin and container, whole and damaged."""
import errno
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import types
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import timm_crossformer  # noqa: F401
from timm_crossformer.checkpoints import writing
from timm_crossformer.checkpoints.architecture import infer_arguments, known_variants
from timm_crossformer.checkpoints.errors import CheckpointError, WeightsError
from timm_crossformer.checkpoints.fitting import convert_state_dict, safe_globals
from timm_crossformer.checkpoints.parsing import parse_state_dict
from timm_crossformer.checkpoints.planning import choose_variant
from timm_crossformer.checkpoints.reading import read_checkpoint
from timm_crossformer.checkpoints.verifying import load_model, verify_directory
from timm_crossformer.checkpoints.writing import convert_file
from timm_crossformer.variants import VARIANTS

GOLDEN = Path(__file__).parents[1] / 'golden'
OFFICIAL_KEYS = json.loads((GOLDEN / 'official_keys.json').read_text())
CASES = {case['id']: case for case in json.loads((GOLDEN / 'cases.json').read_text())}
OFFICIAL = [name for name in VARIANTS if name not in ('crossformer_lucidrains', 'test_crossformer')]


def official_weights(entry, seed=0):
    """Rebuild the synthetic weights that the golden outputs belong to."""
    weights = {}
    for key, shape in OFFICIAL_KEYS[entry].items():
        state = np.random.RandomState((zlib.crc32(key.encode()) + seed) & 0x7fffffff)
        noise = state.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            noise = 1 + 0.1 * noise if key.endswith('weight') else 0.1 * noise
        else:
            noise = noise / np.sqrt(np.prod(shape[1:]))
        weights[key] = torch.from_numpy(noise.astype(np.float32))
    return weights


def to_official(state_dict):
    """Give a small model's weights the official names: the table of the official key list, read backwards."""
    names = ['pos_proj', 'pos1.0', 'pos1.2', 'pos2.0', 'pos2.2', 'pos3.0', 'pos3.2']
    position = dict(zip('0134679', names, strict=True))
    official = {}
    for key, tensor in state_dict.items():
        key = key.replace('stem.convs', 'patch_embed.projs').replace('stem.', 'patch_embed.')
        down = re.fullmatch(r'stages\.(\d)\.downsample\.(.*)', key)
        if down:
            key = f'layers.{int(down[1]) - 1}.downsample.{down[2].replace("convs", "reductions")}'
        key = key.replace('stages.', 'layers.').replace('cooling.conv', 'ex_conv').replace('cooling.norm', 'ex_ln')
        key = re.sub(r'pos_bias\.mlp\.(\d)', lambda m: f'pos.{position[m[1]]}', key).replace('head.fc.', 'head.')
        official[key] = tensor
    return official


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return timm.create_model('test_crossformer', cooling=True, num_classes=7).eval()


@pytest.fixture(scope='module')
def official(small):
    return to_official(small.state_dict())


def fresh(**kwargs):
    torch.manual_seed(1)
    return timm.create_model('test_crossformer', **{'cooling': True, 'num_classes': 7, **kwargs}).eval()


def same(model, reference):
    ours, theirs = model.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# Official weights

@pytest.mark.parametrize('kind', ['cls', 'det'])
@pytest.mark.parametrize('variant', OFFICIAL)
def test_every_official_key_lands_once(variant, kind):
    source = {key: torch.empty(shape, device='meta') for key, shape in OFFICIAL_KEYS[f'{kind}-{variant}'].items()}
    model = timm.create_model(variant, device='meta')
    converted = convert_state_dict(source, model)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()
                if kind == 'cls' or not key.startswith(('norm.', 'head.'))}
    assert {key: tensor.shape for key, tensor in converted.items()} == expected
    assert len(converted) == len(source)


@pytest.mark.parametrize('kind', ['cls', 'det'])
@pytest.mark.parametrize('variant', OFFICIAL)
def test_variant_is_inferred_from_shapes(variant, kind):
    source = {key: torch.empty(shape, device='meta') for key, shape in OFFICIAL_KEYS[f'{kind}-{variant}'].items()}
    dense_groups = {'group_size': 7, 'interval': (8, 4, 2, 1)} if '_pp_' in variant else {}
    expected = {} if kind == 'cls' else {'num_classes': 0, **dense_groups}
    assert choose_variant(parse_state_dict(source)) == (variant, expected)


@pytest.mark.parametrize('variant', list(VARIANTS))
def test_arguments_of_variants_are_those_of_their_shapes(variant):
    args = infer_arguments(timm.create_model(variant, device='meta').state_dict())
    assert {key: args[key] for key in known_variants()[variant]} == known_variants()[variant]


@pytest.mark.parametrize('case', ['cls-crossformer_tiny-224x224', pytest.param(
    'cls-crossformer_pp_small-224x224', marks=pytest.mark.slow)])
def test_official_file_reproduces_official_outputs(case, tmp_path):
    case = CASES[case]
    torch.save({'model': official_weights(f'cls-{case["variant"]}'), 'epoch': 300}, tmp_path / 'official.pth')
    x = np.random.RandomState(case['input_seed']).standard_normal((case['batch'], 3, case['height'], case['width']))
    expected = load_file(GOLDEN / 'golden.safetensors')[f'{case["id"]}/logits']
    model = timm.create_model(case['variant'], checkpoint_path=str(tmp_path / 'official.pth')).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.from_numpy(x.astype(np.float32))), expected, atol=2e-5, rtol=0)


# Containers and prefixes

class CfgNode(dict):
    """Pickles as yacs' config node does: a dict with attributes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__['__immutable__'] = True


CfgNode.__module__ = 'yacs.config'


@pytest.fixture(autouse=True)
def yacs(monkeypatch):
    """Pickle finds the class under its name; reading must do without, see `test_yacs_is_not_imported`."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)


def yacs_config():
    return CfgNode({'MODEL': CfgNode({'TYPE': 'cross', 'SIZES': [4, 8]}), 'OUTPUT': None})


CONTAINERS = {
    'plain': lambda sd: sd,
    'model': lambda sd: {'model': sd, 'epoch': 299, 'max_accuracy': 81.5},
    'optimizer': lambda sd: {'model': sd, 'optimizer': {'state': {0: {'avg': torch.ones(3)}}, 'param_groups': [{}]}},
    'yacs': lambda sd: {'model': sd, 'config': yacs_config()},
    'ddp': lambda sd: {'model': {f'module.{key}': t for key, t in sd.items()}},
    'compiled': lambda sd: {'model': {f'module._orig_mod.{key}': t for key, t in sd.items()}},
    'ema': lambda sd: {'model': {key: t * 0 for key, t in sd.items()}, 'model_ema': sd},
    'timm': lambda sd: {'state_dict': sd, 'arch': 'x', 'epoch': 1},
    'averaged': lambda sd: {'n_averaged': torch.tensor(3), **{f'module.{key}': t for key, t in sd.items()}},
    'tables': lambda sd: {'model': {
        **sd,
        'layers.0.blocks.0.attn.biases': torch.ones(49, 2),
        'layers.0.blocks.0.attn.relative_position_index': torch.ones(16, 16, dtype=torch.long),
        'layers.1.blocks.1.attn_mask': torch.ones(1, 4, 4),
    }},
}


@pytest.mark.parametrize('container', list(CONTAINERS))
def test_containers(container, official, small, tmp_path):
    checkpoint = CONTAINERS[container](official)
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    model = fresh()
    model.load_state_dict(checkpoint)
    assert same(model, small)
    model = fresh(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'checkpoint.pth'), num_classes=7))
    assert same(model, small)
    assert 'state_dict' not in model.pretrained_cfg
    if container != 'yacs':
        assert same(fresh(checkpoint_path=str(tmp_path / 'checkpoint.pth')), small)
    assert same(load_model(weights=tmp_path / 'checkpoint.pth'), small)


HOLDERS = [
    'model_state_dict', 'net', 'model_state', 'params_ema', 'student', 'teacher', 'weights', 'encoder', 'network',
    'mine']


@pytest.mark.parametrize('holder', HOLDERS)
def test_weights_are_found_under_any_key(holder, official, small, tmp_path):
    beside = {'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}}, 'scheduler': {'last': 3}, 'epoch': 3}
    torch.save({**beside, holder: official}, tmp_path / 'x.pth')
    assert same(load_model(weights=tmp_path / 'x.pth'), small)
    model = fresh()
    model.load_state_dict({**beside, holder: official})
    assert same(model, small)
    assert convert_file(tmp_path / 'x.pth', tmp_path / 'out').container == holder


def test_an_average_and_a_teacher_win_and_a_key_chooses(official, small, tmp_path):
    zeros = {key: t * 0 for key, t in official.items()}
    for first, second in (('teacher', 'student'), ('params_ema', 'params'), ('net', 'mine')):
        torch.save({second: zeros, first: official}, tmp_path / 'x.pth')
        assert same(load_model(weights=tmp_path / 'x.pth'), small)
        assert convert_file(tmp_path / 'x.pth', tmp_path / second, key=second).container == second
        assert not load_file(tmp_path / second / 'model.safetensors')['norm.weight'].any()


@pytest.mark.parametrize('nested', [False, True])
def test_two_networks_are_told_apart(nested, official, small, tmp_path):
    both = {**{f'online_model.{key}': t * 0 for key, t in official.items()},
            **{f'ema_model.{key}': t for key, t in official.items()}, 'step': torch.tensor(3)}
    torch.save({'state_dict': both} if nested else both, tmp_path / 'x.pth')
    path = 'state_dict.ema_model' if nested else 'ema_model'
    with pytest.raises(CheckpointError, match=rf"'{path}'.*Choose one by `--key`"):
        convert_file(tmp_path / 'x.pth', tmp_path / 'out')
    for key in ('ema_model', 'ema_model.', path):
        written = convert_file(tmp_path / 'x.pth', tmp_path / 'out', key=key, overwrite=True)
        assert written.prefix == 'ema_model.' and written.left_out == len(official) + 1
        assert same(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), small)
    with pytest.raises(CheckpointError, match=r"no CrossFormer under 'model'\. It has one under '.*online_model' and"):
        convert_file(tmp_path / 'x.pth', tmp_path / 'new', key='model')


def test_two_unknown_keys_are_an_error(official):
    with pytest.raises(CheckpointError, match=r"under each of 'a', 'b'\. Choose one"):
        parse_state_dict({'a': official, 'b': dict(official)})


def test_dicts_inside_each_other_end(official):
    ring = {'model': official}
    ring['again'] = ring
    wide = {str(i): {} for i in range(300)}
    for inner in wide.values():
        inner.update({key: wide for key in wide})
    assert parse_state_dict({**ring, 'wide': wide}).container == 'model'


def test_weights_shared_by_other_parts_are_no_matter(official, tmp_path):
    """Heads of several levels are one module in RetinaNet and two-stage Deformable DETR: saved once, named often."""
    head = torch.rand(200, 200)
    dense = {f'backbone.{key}': t for key, t in official.items() if not key.startswith(('norm.', 'head.'))}
    torch.save({'state_dict': {**dense, **{f'head.{i}.weight': head for i in range(500)}}}, tmp_path / 'x.pth')
    assert convert_file(tmp_path / 'x.pth', tmp_path / 'out').left_out == 500


def test_lazily_negated_weights_have_their_sign(official, small, tmp_path):
    torch.save({key: torch._neg_view(-t) for key, t in official.items()}, tmp_path / 'x.pth')
    convert_file(tmp_path / 'x.pth', tmp_path / 'out')
    assert same(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), small)


def saved_by_timm(model, folder):
    from argparse import Namespace

    from timm.utils import CheckpointSaver, ModelEmaV3

    args = Namespace(model='test_crossformer', lr=0.1, output=Path('/data'), betas=(0.9, 0.99), extra=Namespace(x=[1]))
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(
        model, optimizer, args, ModelEmaV3(model), checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(3, 78.)
    return folder / 'last.pth.tar'


def saved_by_lightning(model, folder):
    lightning = pytest.importorskip('lightning.pytorch')

    class Module(lightning.LightningModule):
        def __init__(self, out=Path('/data'), names=('a', 'b')):
            super().__init__()
            self.save_hyperparameters()
            self.model = model

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch):
            return self.model(batch).sum() * 0

    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu',
        callbacks=[lightning.callbacks.ModelCheckpoint(folder)], default_root_dir=folder)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(1, 3, 32, 32)))
    trainer.save_checkpoint(folder / 'x.ckpt')
    return folder / 'x.ckpt'


def saved_by_accelerate(model, folder):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder / 'state'), safe_serialization=False)
    return folder / 'state' / 'pytorch_model.bin'


@pytest.mark.parametrize('save', [
    saved_by_timm, pytest.param(saved_by_lightning, marks=pytest.mark.clients),
    pytest.param(saved_by_accelerate, marks=pytest.mark.clients)], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings('ignore')
def test_training_checkpoints_as_the_libraries_write_them(save, small, tmp_path):
    source = fresh()
    source.load_state_dict(small.state_dict())
    path = save(source, tmp_path)
    model = fresh()
    model.load_state_dict(read_checkpoint(path))
    assert same(model, small)
    convert_file(path, tmp_path / 'out')
    assert same(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), small)
    assert same(fresh(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=7)), small)


def test_yacs_is_not_imported(official, tmp_path, monkeypatch):
    torch.save({'model': official, 'config': yacs_config()}, tmp_path / 'c.pth')
    monkeypatch.setitem(sys.modules, 'yacs.config', None)
    monkeypatch.setitem(sys.modules, 'yacs', None)
    config = read_checkpoint(tmp_path / 'c.pth')['config']
    assert config['MODEL']['SIZES'] == [4, 8] and not isinstance(config, CfgNode)


def test_timm_reads_a_config_inside_with_our_stand_in_alone(official, small, tmp_path):
    path = str(tmp_path / 'c.pth')
    torch.save({'model': official, 'config': yacs_config()}, path)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(RuntimeError, match=r'yacs\.config\.CfgNode'):  # its reader, its rule
        fresh(checkpoint_path=path)
    with safe_globals():
        assert same(fresh(checkpoint_path=path), small)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize('prefix', ['backbone.', 'module.backbone.'])
def test_detector_backbone(prefix, official, small):
    dense = {f'{prefix}{key}': t for key, t in official.items() if not key.startswith(('norm.', 'head.'))}
    others = {'neck.convs.0.weight': torch.ones(2), 'decode_head.x': torch.ones(2)}
    detector = {'state_dict': {**dense, **others}, 'meta': {}}
    parsed = parse_state_dict(detector)
    assert parsed.dense and sorted(parsed.left_out) == ['decode_head.x', 'neck.convs.0.weight']
    with pytest.raises(CheckpointError, match=r'no final norm and no classifier.*strict=False'):
        fresh().load_state_dict(detector)
    model = fresh()
    result = model.load_state_dict(detector, strict=False)
    assert sorted(result.missing_keys) == ['head.fc.bias', 'head.fc.weight', 'norm.bias', 'norm.weight']
    assert torch.equal(model.stages[3].blocks[1].mlp.fc2.weight, small.stages[3].blocks[1].mlp.fc2.weight)


def test_dense_file_loads_with_features_only_and_is_refused_as_classifier(official, small, tmp_path):
    dense = {f'backbone.{key}': t for key, t in official.items() if not key.startswith(('norm.', 'head.'))}
    torch.save({'state_dict': dense}, tmp_path / 'det.pth')
    overlay = dict(file=str(tmp_path / 'det.pth'), num_classes=7)
    model = fresh(features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.stages_2.blocks[2].cooling.conv.weight, small.stages[2].blocks[2].cooling.conv.weight)
    with pytest.raises(CheckpointError, match='features_only=True'):
        fresh(pretrained=True, pretrained_cfg_overlay=overlay)


def test_classifier_that_fits_is_kept_though_the_cfg_says_1000(official, small, tmp_path):
    torch.save(official, tmp_path / 'seven.pth')
    overlay = dict(file=str(tmp_path / 'seven.pth'))
    assert same(fresh(pretrained=True, pretrained_cfg_overlay=overlay), small)
    other = fresh(pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=7), num_classes=3)
    assert other.head.fc.weight.shape[0] == 3 and torch.equal(other.norm.weight, small.norm.weight)
    with pytest.raises(RuntimeError, match='size mismatch'):
        timm.create_model('test_crossformer', cooling=True, pretrained=True, pretrained_cfg_overlay=overlay)


def test_channels_are_adapted(official, small, tmp_path):
    torch.save(official, tmp_path / 'rgb.pth')
    overlay = dict(file=str(tmp_path / 'rgb.pth'), num_classes=7)
    model = fresh(in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.stem.convs[0].weight, small.stem.convs[0].weight.sum(dim=1, keepdim=True))


# Other implementations

def test_vit_pytorch_outputs(tmp_path):
    vit_pytorch = pytest.importorskip('vit_pytorch.crossformer')
    torch.manual_seed(0)
    net = vit_pytorch.CrossFormer(dim=(32, 64, 96, 128), depth=(1, 1, 2, 1), num_classes=5, channels=2).eval()
    parsed = parse_state_dict(net.state_dict())
    name, args = choose_variant(parsed)
    assert name == 'crossformer_lucidrains'
    assert (args['depths'], args['num_classes'], args['in_chans']) == ((2, 2, 4, 2), 5, 2)
    model = timm.create_model(name, **args).eval()
    model.load_state_dict(net.state_dict())
    x = torch.rand(1, 2, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), net(x), atol=1e-5, rtol=0)


def test_vit_pytorch_default_is_our_variant():
    vit_pytorch = pytest.importorskip('vit_pytorch.crossformer')
    with torch.device('meta'):
        state_dict = vit_pytorch.CrossFormer().state_dict()
    assert choose_variant(parse_state_dict(state_dict)) == ('crossformer_lucidrains', {})


@pytest.mark.parametrize('size', [
    (256, 352), *(pytest.param((side, side), marks=pytest.mark.slow) for side in (224, 256, 384)),
], ids=str)
def test_birder_outputs(size):
    birder = pytest.importorskip('birder.net.crossformer')
    torch.manual_seed(0)
    config = {'embed_dim': 96, 'depths': [2, 2, 6, 2], 'num_heads': [3, 6, 12, 24], 'drop_path_rate': 0.}
    net = birder.CrossFormer(3, 11, config=config, size=size).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    name, args = choose_variant(parse_state_dict(net.state_dict()))
    assert name == 'crossformer_small' and args['num_classes'] == 11
    model = timm.create_model(name, **args).eval()
    model.load_state_dict({'state': net.state_dict(), 'birder_version': '0.8.4'})
    x = torch.rand(1, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), net(x), atol=2e-5, rtol=0)


def test_birder_weights_in_a_model_with_other_groups_warn():
    birder = pytest.importorskip('birder.net.crossformer')
    config = {'embed_dim': 32, 'depths': [2, 2, 2, 2], 'num_heads': [1, 2, 4, 8], 'drop_path_rate': 0.}
    net = birder.CrossFormer(3, 2, config=config, size=(256, 352))
    args = dict(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=2)
    with pytest.warns(UserWarning, match=r'8 x 11.*group_size'):
        timm.create_model('crossformer_small', **args).load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm.create_model('crossformer_small', group_size=((8, 11),) * 4, **args).load_state_dict(net.state_dict())


# Own weights

def test_own_state_dict_passes_untouched(small):
    model, state_dict = fresh(), small.state_dict()
    model.load_state_dict(state_dict, assign=True)
    assert model.norm.weight.data_ptr() == state_dict['norm.weight'].data_ptr()
    assert model.load_state_dict({}, strict=False).missing_keys
    with pytest.raises(RuntimeError, match='Unexpected key'):
        model.load_state_dict({**state_dict, 'foo': torch.ones(1)})


def test_dtype_is_kept(official):
    half = {key: tensor.half() for key, tensor in official.items()}
    assert {tensor.dtype for tensor in parse_state_dict(half).state_dict.values()} == {torch.float16}


# Names that models inside other models write

def pyramid(**kwargs):
    return fresh(features_only=True, **kwargs)


NAMES = {
    'pyramid': lambda sd: sd,
    'ddp': lambda sd: {f'module.{key}': t for key, t in sd.items()},
    'smp-encoder': lambda sd: {f'model.{key}': t for key, t in sd.items()},
    'smp': lambda sd: {
        **{f'encoder.model.{key}': t for key, t in sd.items()},
        'decoder.blocks.0.conv1.0.weight': torch.ones(2), 'segmentation_head.0.bias': torch.ones(2)},
    'lightning-smp': lambda sd: {
        'state_dict': {**{f'model.encoder.model.{key}': t for key, t in sd.items()}, 'model.decoder.x': torch.ones(2)}},
    'timm-backbone': lambda sd: {f'_backbone.{key}': t for key, t in sd.items()},
    'transformers': lambda sd: {
        **{f'model.backbone.model._backbone.{key}': t for key, t in sd.items()}, 'class_head.bias': torch.ones(2)},
    'detr': lambda sd: {
        **{f'model.backbone.model.{key}': t for key, t in sd.items()},
        'model.encoder.layers.0.fc1.weight': torch.ones(2), 'class_labels_classifier.bias': torch.ones(2)},
    'detr-4': lambda sd: {
        **{f'model.backbone.conv_encoder.model.{key}': t for key, t in sd.items()}, 'bbox.bias': torch.ones(2)},
    'detector': lambda sd: {'state_dict': {**{f'backbone.{key}': t for key, t in sd.items()}, 'neck.x': torch.ones(2)}},
}


@pytest.mark.parametrize('names', list(NAMES))
def test_weights_of_a_pyramid_come_home(names, small, tmp_path):
    source = pyramid(num_classes=0)
    source.load_state_dict(small.state_dict())
    checkpoint = NAMES[names](source.state_dict())
    body = {key: t for key, t in small.state_dict().items() if not key.startswith(('norm.', 'head.'))}

    classifier = fresh()
    with pytest.raises(CheckpointError, match=r'no final norm and no classifier.*strict=False'):
        classifier.load_state_dict(checkpoint)
    result = classifier.load_state_dict(checkpoint, strict=False)
    assert sorted(result.missing_keys) == ['head.fc.bias', 'head.fc.weight', 'norm.bias', 'norm.weight']
    assert not result.unexpected_keys
    assert all(torch.equal(classifier.state_dict()[key], t) for key, t in body.items())

    again = pyramid()
    again.load_state_dict(checkpoint)
    assert same(again, source)

    torch.save(checkpoint, tmp_path / 'x.pth')
    assert convert_file(tmp_path / 'x.pth', tmp_path / 'out').dense
    home = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, features_only=True)
    assert same(home, source)


@pytest.mark.parametrize('change', [dict(), dict(out_indices=(0, 1)), dict(out_indices=(1, 2))], ids=str)
@pytest.mark.parametrize('names', ['own', 'official', 'container'])
def test_a_pyramid_takes_what_it_has(names, change, small, official):
    checkpoint = {
        'own': small.state_dict(), 'official': official,
        'container': {'model': {f'module.{k}': t for k, t in official.items()}}}[names]
    model = pyramid(**change)
    model.load_state_dict(checkpoint)
    ours = small.state_dict()
    assert all(torch.equal(t, ours[re.sub('^stages_', 'stages.', key)]) for key, t in model.state_dict().items())
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r'lacks 1 weights: stages\.0\.blocks\.0\.norm1\.bias'):
        model.load_state_dict({k: t for k, t in checkpoint.items() if k != 'stages.0.blocks.0.norm1.bias'} if (
            names == 'own') else {k: t for k, t in small.state_dict().items() if k != 'stages.0.blocks.0.norm1.bias'})


@pytest.mark.clients
@pytest.mark.filterwarnings('ignore')
def test_names_are_those_that_the_libraries_write(small):
    smp = pytest.importorskip('segmentation_models_pytorch')
    transformers = pytest.importorskip('transformers')
    unet = smp.Unet('tu-test_crossformer', encoder_weights=None)
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(
        backbone='test_crossformer', out_indices=[0, 1, 2, 3], use_pretrained_backbone=False))
    for source in (unet, unet.encoder, backbone):
        model = timm.create_model('test_crossformer', features_only=True)
        model.load_state_dict(source.state_dict())
        inner = backbone._backbone if source is backbone else unet.encoder.model
        assert same(model, inner)


# What does not fit

def meta_official(entry):
    return {key: torch.empty(shape, device='meta') for key, shape in OFFICIAL_KEYS[entry].items()}


@pytest.mark.parametrize('model, source, message', [
    ('crossformer_small', 'cls-crossformer_pp_base', r'amplitude cooling layers \(ACL\): try crossformer_pp_base'),
    ('crossformer_base', 'cls-crossformer_pp_base', r'layers\.2\.blocks\.2\.ex_conv\.bias.*try crossformer_pp_base'),
    ('crossformer_base', 'cls-crossformer_large', r'weights have another shape.*try crossformer_large'),
    ('crossformer_small', 'cls-crossformer_base', r'no place: layers\.2\.blocks\.10.*try crossformer_base'),
    ('crossformer_base', 'cls-crossformer_small', r'lacks \d+ weights.*try crossformer_small'),
    ('crossformer_pp_base', 'cls-crossformer_base', r'lacks 20 weights.*try crossformer_base'),
], ids=['acl-depth', 'acl', 'embed_dim', 'deeper', 'shallower', 'no-acl'])
def test_wrong_variant_is_named(model, source, message):
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(meta_official(source), timm.create_model(model, device='meta'))


def own_of(variant, **kwargs):
    return timm.create_model(variant, **kwargs).state_dict()


@pytest.mark.parametrize('how', [
    'state_dict', 'container', 'pyramid', 'checkpoint_path', 'safetensors', 'pth', 'features_only'])
@pytest.mark.parametrize('model, source', [
    ('crossformer_tiny', 'test_crossformer'), ('test_crossformer', 'crossformer_tiny'),
    pytest.param('crossformer_base', 'crossformer_small', marks=pytest.mark.slow),
    pytest.param('crossformer_small', 'crossformer_pp_small', marks=pytest.mark.slow),
])
def test_own_weights_of_another_variant_get_the_same_hint(model, source, how, tmp_path):
    weights = own_of(source)
    path = tmp_path / ('x.safetensors' if how == 'safetensors' else 'x.pth')
    save_file(weights, path) if how == 'safetensors' else torch.save(weights, path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    reason = r'ACL\)' if '_pp_' in source else 'It is of another variant'
    shallower = (model, source) == ('crossformer_base', 'crossformer_small')
    what = r'the checkpoint lacks 312 weights: ' if shallower else r'\d+ '
    with pytest.raises(CheckpointError, match=rf'{model}: {what}.*{reason}: try {source}\.$'):
        if how == 'state_dict':
            timm.create_model(model).load_state_dict(weights)
        elif how == 'container':
            timm.create_model(model).load_state_dict({'state_dict': weights})
        elif how == 'pyramid':
            timm.create_model(model, features_only=True).load_state_dict(weights)
        elif how == 'checkpoint_path':
            timm.create_model(model, checkpoint_path=str(path))
        else:
            timm.create_model(model, features_only=how == 'features_only', **overlay)


@pytest.mark.parametrize('how', ['lightning', 'own', 'convert'])
@pytest.mark.parametrize('kwargs', [{}, {'cooling': True}, {'num_classes': 3, 'in_chans': 1}], ids=str)
def test_a_hint_names_another_variant_only_if_it_is_another(how, kwargs, tmp_path):
    model = timm.create_model('test_crossformer', **kwargs)
    weights = {'criterion.weight': torch.ones(3), **{f'model.{key}': t for key, t in model.state_dict().items()}}
    with pytest.raises(RuntimeError) as e:
        if how == 'lightning':
            model.load_state_dict({'state_dict': weights, 'pytorch-lightning_version': '2.6'})
        elif how == 'own':
            model.load_state_dict({**model.state_dict(), 'criterion.weight': torch.ones(3)})
        else:
            torch.save({'state_dict': weights}, tmp_path / 'x.pth')
            convert_file(tmp_path / 'x.pth', tmp_path / 'out')
    message = str(e.value)
    assert 'criterion.weight' in message and 'another variant' not in message and 'try ' not in message
    if how == 'lightning':
        assert message.endswith('The rest of the checkpoint fits: take these keys out, or fetch it again.')


def test_rest_is_listed_in_order(official):
    with pytest.raises(CheckpointError, match=r'2 checkpoint keys have no place: aaa\.weight, layers\.9\.x'):
        convert_state_dict({**official, 'layers.9.x': torch.ones(1), 'aaa.weight': torch.ones(1)}, fresh())


@pytest.mark.parametrize('change, message', [
    (lambda sd: {**sd, 'norm.weight': sd['norm.weight'].long()}, 'floating point'),
    (lambda sd: {**sd, 'norm.weight': sd['norm.weight'] * float('nan')}, 'finite.*norm.weight'),
    (lambda sd: {**sd, 'norm.weight': 'text'}, 'needs to be a tensor'),
    (lambda sd: {**sd, 'norm.weight': sd['norm.weight'][None]}, 'another shape'),
    (lambda sd: {**sd, 'norm.weight': sd['norm.weight'][:1]}, 'another shape'),
    (lambda sd: {k: v for k, v in sd.items() if k != 'norm.weight'}, 'lacks 1 weights: norm.weight'),
    (lambda sd: {k: v for k, v in sd.items() if k != 'layers.1.blocks.0.norm1.bias'}, 'lacks 1 weights'),
    (lambda sd: {**sd, 3: torch.ones(1)}, 'Keys of a state dict are strings'),
    (lambda sd: {**{f'a.{k}': v for k, v in sd.items()}, **{f'b.{k}': v for k, v in sd.items()}}, 'one CrossFormer'),
    (lambda sd: {f'x.{k}': v for k, v in sd.items() if 'blocks.0.norm1' not in k}, 'no checkpoint of a CrossFormer'),
    (lambda sd: {**sd, 'model': 3}, 'no place'),
    (lambda sd: {'model': fresh(), 'epoch': 1}, 'a whole object under model. Save the state dict of the model'),
    (lambda sd: {**sd, 'layers.0.blocks.0.mlp.fc1.weight': sd['layers.0.blocks.0.mlp.fc1.weight'].T},
     r'It fits no variant: mlp_ratio=\(1\.0, '),
    (lambda sd: {**sd, 'norm.g': sd['norm.weight']}, 'one source, got two: norm.weight and norm.g'),
    (lambda sd: {}, 'no checkpoint of a CrossFormer'),
], ids=[
    'integers', 'nan', 'text', 'rank', 'short', 'half-dense', 'hole', 'number-key', 'two', 'no-anchor', 'odd',
    'whole', 'turned', 'twice', 'empty',
])
def test_damaged_state_dicts(official, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(change(official), fresh())


def test_filter_never_raises_type_error():
    for checkpoint in (None, 3, [1], {'model': [1]}, {None: None}, {'layers.0.blocks.0.norm1.weight': None}):
        with pytest.raises(CheckpointError):
            convert_state_dict(checkpoint, fresh())


# Files

class Malicious:
    def __reduce__(self):
        return os.system, ('touch pwned',)


def damage(path, kind, official):
    raw = path.read_bytes()
    if kind == 'truncated':
        path.write_bytes(raw[:len(raw) // 2])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_bytes(b'<html>404</html>' * 100)
    elif kind == 'flipped-header':
        path.write_bytes(raw[:40] + bytes([raw[40] ^ 0x40]) + raw[41:])
    elif kind == 'flipped-data':
        middle = raw.index(official['head.weight'].numpy().tobytes()[:64])
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1:])
    elif kind == 'malicious':
        torch.save({'model': official, 'config': Malicious()}, path)
    elif kind == 'malicious-legacy':
        path.write_bytes(pickle.dumps({'model': Malicious()}))
    elif kind == 'compressed':
        with zipfile.ZipFile(path) as source:
            records = {info.filename: source.read(info) for info in source.infolist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target:
            for name, record in records.items():
                target.writestr(name, record)
    elif kind == 'stretched':
        torch.save({**official, 'head.weight': torch.ones(1, 1).expand(10 ** 6, 10 ** 6)}, path)
    elif kind == 'many-keys':
        torch.save({f'k{i}': 0 for i in range(100_001)}, path)
    elif kind == 'list':
        torch.save([official], path)


@pytest.mark.parametrize('suffix, kind', [
    *(('.pth', kind) for kind in (
        'truncated', 'empty', 'text', 'flipped-data', 'malicious', 'malicious-legacy', 'compressed', 'stretched',
        'many-keys', 'list')),
    *(('.safetensors', kind) for kind in ('truncated', 'empty', 'text', 'flipped-header')),
])
def test_damaged_files_end_in_an_error_and_leave_nothing(suffix, kind, official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f'source{suffix}'
    if suffix == '.pth':
        torch.save(official, path)
    else:
        save_file(official, path)
    damage(path, kind, official)
    with pytest.raises(CheckpointError, match=re.escape('source')):
        convert_file(path, tmp_path / 'out')
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_damaged_local_directory_is_named(official, tmp_path):
    torch.save(official, tmp_path / 's.pth')
    convert_file(tmp_path / 's.pth', tmp_path / 'out')
    weights = tmp_path / 'out' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r'out.*no intact safetensors'):
        timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)


def test_safetensors_is_known_by_content(official, tmp_path):
    save_file(official, tmp_path / 'blob')
    assert read_checkpoint(tmp_path / 'blob').keys() == official.keys()


def test_refusal_names_what_the_file_wanted(tmp_path):
    torch.save({'model': Malicious()}, tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match=r'asks to import (posix|nt)\.system\. Nothing in it was run'):
        read_checkpoint(tmp_path / 'evil.pth')


@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_converted_directory_is_verified_and_loads(suffix, dtype, official, small, tmp_path):
    source = tmp_path / f'source{suffix}'
    torch.save({'model': official}, source) if suffix == '.pth' else save_file(official, source)
    facts = convert_file(source, tmp_path / 'out', dtype=dtype)
    assert facts.num_classes == 7 and facts.model == 'crossformer_pp_small'
    assert all(check.ok for check in verify_directory(tmp_path / 'out', source))
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert torch.equal(model.norm.weight, small.norm.weight.to(dtype or torch.float32).float())


@pytest.mark.parametrize('dtype', [None, torch.float16], ids=str)
def test_eight_bits_are_read(dtype, official, tmp_path):
    eight = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in official.items()}
    torch.save(eight, tmp_path / 'own.pth')
    convert_file(tmp_path / 'own.pth', tmp_path / 'out', dtype=dtype)
    assert all(check.ok for check in verify_directory(tmp_path / 'out', tmp_path / 'own.pth'))
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert torch.equal(model.norm.weight, eight['norm.weight'].float())
    torch.save({**eight, 'norm.weight': torch.full([64], float('nan')).to(torch.float8_e4m3fn)}, tmp_path / 'own.pth')
    with pytest.raises(CheckpointError, match='finite'):
        convert_file(tmp_path / 'own.pth', tmp_path / 'new')


CONFIG = """
optimizer = dict(type='AdamW', lr=0.0001)
evaluation = dict(interval=1)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='CrossFormer_S',
        group_size={groups},
        crs_interval={intervals},
        adaptive_interval=False),
    neck=dict(type='FPN'))
"""


@pytest.mark.parametrize('style', ['pretty', 'lines', 'json', 'cfg', 'none', 'broken', 'short'])
def test_groups_are_read_from_a_dense_checkpoints_config(style, official, tmp_path):
    dense = {f'backbone.{key}': t for key, t in official_weights('det-crossformer_small').items()}
    text = CONFIG.format(groups='[14, 14, 7, 7]', intervals='[16, 8, 2, 1]')
    text = {
        'lines': CONFIG.format(groups='[\n  14,\n  14,\n 7, 7\n]', intervals='(\n16, 8, 2, 1,)'),
        'json': json.dumps({'model': {'backbone': {'group_size': [14, 14, 7, 7], 'crs_interval': [16, 8, 2, 1]}}}),
        'none': 'model = dict()', 'broken': CONFIG.format(groups='__import__("os")', intervals='[0, 0, 0, 0]'),
        'short': CONFIG.format(groups='[14, 14]', intervals='[16, 8]'),
    }.get(style, text)
    torch.save({'state_dict': dense, 'meta': {'cfg' if style == 'cfg' else 'config': text}}, tmp_path / 'fpn.pth')
    large = {'group_size': (14, 14, 7, 7), 'interval': (16, 8, 2, 1)}
    expected = {} if style in ('none', 'broken', 'short') else large
    facts = convert_file(tmp_path / 'fpn.pth', tmp_path / 'out')
    assert facts.model == 'crossformer_small' and facts.args == {'num_classes': 0, **expected}
    assert facts.groups_from == ('checkpoint' if expected else 'default')
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, features_only=True)
    assert model.stages_0.blocks[0].attn.group_size == ((14, 14) if expected else (7, 7))
    facts = convert_file(tmp_path / 'fpn.pth', tmp_path / 'other', groups=dict(interval=(4, 2, 1, 1)))
    assert facts.args == {'num_classes': 0, **expected, 'interval': (4, 2, 1, 1)}
    assert facts.groups_from == 'option'
    if expected:
        overlay = dict(file=str(tmp_path / 'fpn.pth'))
        with pytest.warns(UserWarning) as told:
            timm.create_model('crossformer_small', pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
        assert [str(w.message).split(',')[0] for w in told] == [
            'The checkpoint was trained with group_size=(14', 'The checkpoint was trained with interval=(16']
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            timm.create_model(
                'crossformer_small', pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, **large)


@pytest.mark.parametrize('written', ['adaptive_interval=True', '"adaptive_interval": true'])
def test_intervals_that_follow_the_size_are_not_ignored(written, tmp_path):
    dense = {f'backbone.{key}': t for key, t in official_weights('det-crossformer_small').items()}
    text = CONFIG.format(groups='[7, 7, 7, 7]', intervals='[8, 4, 2, 1]').replace('adaptive_interval=False', written)
    torch.save({'state_dict': dense, 'meta': {'config': text}}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'adaptive_interval=True.*--lda-grouping grid'):
        convert_file(tmp_path / 'x.pth', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    facts = convert_file(tmp_path / 'x.pth', tmp_path / 'out', groups=dict(lda_grouping='grid'))
    assert facts.args['lda_grouping'] == 'grid'
    overlay = dict(pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')))
    with pytest.warns(UserWarning, match=r"lda_grouping='grid'"):
        timm.create_model('crossformer_small', **overlay)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm.create_model('crossformer_small', lda_grouping='grid', **overlay)


@pytest.mark.parametrize('groups, expected', [
    ('[7, 7, 7, 7]', {}), ('[4, 4, 14, 7]', {'group_size': (4, 4, 14, 7)}),
], ids=str)
def test_groups_in_the_config_win_over_those_of_dense_plus_plus(groups, expected):
    text = CONFIG.format(groups=groups, intervals='[8, 4, 2, 1]')
    dense = {f'backbone.{key}': t for key, t in meta_official('det-crossformer_pp_small').items()}
    name, args = choose_variant(parse_state_dict({'state_dict': dense, 'meta': {'config': text}}))
    default = {'group_size': 7} if not expected else {}
    assert (name, args) == ('crossformer_pp_small', {
        'num_classes': 0, 'interval': (8, 4, 2, 1), **default,
        **{key: value for key, value in expected.items() if value != (4, 4, 14, 7)}})


@pytest.mark.parametrize('damaged', ['hash', 'keys', 'nan', 'config', 'file', 'against', 'classes'])
def test_verify_finds_damage(damaged, official, tmp_path):
    source, out = tmp_path / 'source.pth', tmp_path / 'out'
    torch.save(official, source)
    convert_file(source, out)
    weights = load_file(out / 'model.safetensors')
    if damaged == 'hash':
        weights['norm.bias'] += 1
    elif damaged == 'keys':
        del weights['norm.bias']
    elif damaged == 'nan':
        weights['norm.bias'] *= float('nan')
    elif damaged == 'config':
        (out / 'config.json').write_text('{')
    elif damaged == 'against':
        torch.save({**official, 'norm.bias': official['norm.bias'] + 1e-3}, source)
    elif damaged == 'classes':
        fewer = {key: official[key][:5] for key in ('head.weight', 'head.bias')}
        torch.save({**official, **fewer}, source)
    if damaged == 'file':
        (out / 'model.safetensors').unlink()
    elif damaged in ('hash', 'keys', 'nan'):
        save_file(weights, out / 'model.safetensors')
    assert not all(check.ok for check in verify_directory(out, source))


def test_verify_compares_in_the_network_of_the_directory(tmp_path):
    model = timm.create_model('test_crossformer', act_layer='relu', fit_groups=True, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / 'out', safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    checks = verify_directory(tmp_path / 'out', tmp_path / 'own.pth')
    assert [c.check for c in checks if not c.ok] == [] and checks[-1].check == 'against'
    assert 'outputs differ by 0 at most, 0 allowed' in checks[-1].detail


def test_names_of_classes_come_from_nobody_else(tmp_path):
    for classes in (10, 3):
        torch.save(timm.create_model('test_crossformer', num_classes=classes).state_dict(), tmp_path / 'own.pth')
        convert_file(tmp_path / 'own.pth', tmp_path / f'{classes}')
        assert 'label_names' not in (tmp_path / f'{classes}' / 'config.json').read_text()
        for weights in ('own.pth', f'{classes}'):
            assert not load_model(weights=tmp_path / weights).pretrained_cfg.get('label_names')


def test_the_card_has_the_name_of_the_folder(official, tmp_path, monkeypatch):
    torch.save(official, tmp_path / 's.pth')
    (tmp_path / 'mine').mkdir()
    monkeypatch.chdir(tmp_path / 'mine')
    convert_file(tmp_path / 's.pth', '.')
    card = Path('README.md').read_text()
    assert '\n# mine\n' in card and "'hf-hub:OWNER/mine'" in card


def test_options_of_convert(official, tmp_path):
    torch.save(official, tmp_path / 's.pth')
    groups = dict(group_size=(3, 3, 3, 3), interval=2)
    facts = convert_file(tmp_path / 's.pth', tmp_path / 'a', groups=groups, num_classes=0)
    assert facts.num_classes == 0 and facts.args['group_size'] == (3, 3, 3, 3)
    model = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    assert model.num_classes == 0 and model.stages[1].blocks[1].attn.interval == 2
    for kwargs, message in [
        (dict(num_classes=5), 'num_classes'),
        (dict(model='crossformer_tiny'), 'crossformer_tiny'),
        (dict(model='resnet50'), 'is one of'),
        (dict(expected_sha256='00'), 'sha256'),
        (dict(expected_sha256=''), 'sha256'),
        (dict(key='ema'), "under 'ema'"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert_file(tmp_path / 's.pth', tmp_path / 'b', **kwargs)
    assert not (tmp_path / 'b').exists()
    with pytest.raises(CheckpointError, match='overwrite'):
        convert_file(tmp_path / 's.pth', tmp_path / 'a')
    convert_file(tmp_path / 's.pth', tmp_path / 'a', overwrite=True)
    assert all(check.ok for check in verify_directory(tmp_path / 'a'))


@pytest.fixture
def elsewhere(tmp_path):
    """A folder in another file system, as a volume of a container is."""
    shared = Path('/dev/shm')
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip('there is one file system')
    folder = Path(tempfile.mkdtemp(dir=shared))
    yield folder
    shutil.rmtree(folder)


def test_a_directory_that_exists_stays_itself(official, small, tmp_path, elsewhere):
    torch.save(official, tmp_path / 's.pth')
    (tmp_path / 'link').symlink_to(elsewhere)
    before = elsewhere.stat().st_ino
    for overwrite in (False, True):
        convert_file(tmp_path / 's.pth', tmp_path / 'link', overwrite=overwrite)
        assert (tmp_path / 'link').is_symlink() and elsewhere.stat().st_ino == before
        assert sorted(path.name for path in elsewhere.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
        assert same(timm.create_model(f'local-dir:{tmp_path / "link"}', pretrained=True), small)


def test_a_mount_point_is_written_into(official, tmp_path, monkeypatch):
    """Nothing can take the place of a mount point, as of the current folder of another process on Windows."""
    torch.save(official, tmp_path / 's.pth')
    (tmp_path / 'out').mkdir()
    replace = os.replace

    def busy(source, target, **kwargs):
        if Path(target) == tmp_path / 'out':
            raise OSError(errno.EBUSY, 'Device or resource busy')
        replace(source, target, **kwargs)

    monkeypatch.setattr(os, 'replace', busy)
    convert_file(tmp_path / 's.pth', tmp_path / 'out')
    assert len(list((tmp_path / 'out').iterdir())) == 3


@pytest.mark.parametrize('where', ['weights', 'config'])
def test_a_full_disk_is_one_message(where, official, tmp_path, monkeypatch):
    torch.save(official, tmp_path / 's.pth')

    def full(*args, **kwargs):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)') if (
            where == 'weights') else OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(writing, 'save_file' if where == 'weights' else 'save_config_for_hf', full)
    with pytest.raises(WeightsError, match=r'out cannot be written: .*No space left on device.*'):
        convert_file(tmp_path / 's.pth', tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['s.pth']


def test_names_of_files_may_be_no_text(official, small, tmp_path):
    name = os.fsdecode(b's\xff.pth')
    try:
        torch.save(official, tmp_path / 's.pth')
        (tmp_path / 's.pth').rename(tmp_path / name)
    except (OSError, ValueError):
        pytest.skip('this file system wants text')
    out = tmp_path / os.fsdecode(b'o\xff')
    written = convert_file(tmp_path / name, out)
    assert written.source == r's\udcff.pth' and r'# o\udcff' in (out / 'README.md').read_text(encoding='utf-8')
    assert same(load_model(weights=tmp_path / name), small)


@pytest.mark.parametrize('overwrite', [False, True])
def test_interrupted_writing_leaves_what_was_there(official, tmp_path, monkeypatch, overwrite):
    torch.save(official, tmp_path / 's.pth')
    before = {}
    if overwrite:
        convert_file(tmp_path / 's.pth', tmp_path / 'out')
        before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}

    def half(tensors, path, **kwargs):
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_crossformer.checkpoints.writing.save_file', half)
    with pytest.raises(KeyboardInterrupt):
        convert_file(tmp_path / 's.pth', tmp_path / 'out', overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == (['out', 's.pth'] if overwrite else ['s.pth'])
    assert not overwrite or {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before


def test_fp16_beyond_its_range_is_refused(official, tmp_path):
    torch.save({**official, 'norm.weight': official['norm.weight'] * 1e6}, tmp_path / 's.pth')
    with pytest.raises(CheckpointError, match=r'`norm\.weight` has values beyond the range'):
        convert_file(tmp_path / 's.pth', tmp_path / 'out', dtype=torch.float16)
    assert not (tmp_path / 'out').exists()


# Whatever is done to the keys, the model is right or there is an error

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_keys_gives_a_silently_wrong_model(official, small, data):
    source = dict(official)
    keys = sorted(source)
    actions = st.sampled_from(['drop', 'rename', 'swap', 'prefix', 'add', 'stage'])
    for action in data.draw(st.lists(actions, max_size=3)):
        key = data.draw(st.sampled_from(keys))
        if key not in source:
            continue
        if action == 'drop':
            del source[key]
        elif action == 'rename':
            new = key.replace(*data.draw(st.sampled_from([
                ('blocks.0', 'blocks.1'), ('norm1', 'norm2'), ('weight', 'bias'), ('layers.', 'layer.'), ('0', '1')])))
            source[new] = source.pop(key)
        elif action == 'swap':
            other = data.draw(st.sampled_from(keys))
            if other in source and source[other].shape != source[key].shape:
                source[key], source[other] = source[other], source[key]
        elif action == 'prefix':
            prefix = data.draw(st.sampled_from(['module.', 'backbone.', 'model.', 'x']))
            source = {f'{prefix}{name}': tensor for name, tensor in source.items()}
        elif action == 'add':
            source[data.draw(st.sampled_from(['extra', f'{key}.extra', f'module.{key}', f'{key[:-1]}']))] = source[key]
        elif action == 'stage':
            source = {name.replace('layers.1', 'layers.2'): tensor for name, tensor in source.items()}
    model = fresh()
    try:
        model.load_state_dict(source)
    except (CheckpointError, RuntimeError):
        return
    assert same(model, small)


def _load_into(way, checkpoint, path):
    """Load a state dict, or a file of it, into a model of another variant."""
    def create(**args):
        return timm.create_model('crossformer_tiny', num_classes=10, **args)

    torch.save({'state_dict': checkpoint}, path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    whole = torch.nn.ModuleDict(dict(backbone=create()))
    {
        'strict': lambda: create().load_state_dict(checkpoint),
        'not strict': lambda: create().load_state_dict(checkpoint, strict=False),
        'load_checkpoint': lambda: timm.models.load_checkpoint(create(), str(path)),
        'load_checkpoint, not strict': lambda: timm.models.load_checkpoint(create(), str(path), strict=False),
        'checkpoint_path': lambda: create(checkpoint_path=str(path)),
        'overlay': lambda: create(**overlay),
        'pyramid': lambda: timm.create_model('crossformer_tiny', features_only=True, **overlay),
        'part': lambda: whole.load_state_dict({f'backbone.{key}': value for key, value in checkpoint.items()}),
    }[way]()


@pytest.mark.parametrize('form', ['own', 'pyramid'])
@pytest.mark.parametrize('way', [
    'strict', 'not strict', 'load_checkpoint', 'load_checkpoint, not strict', 'checkpoint_path', 'overlay', 'pyramid',
    'part'])
def test_one_message_for_weights_of_another_variant_whichever_way(way, form, tmp_path):
    checkpoint = timm.create_model('test_crossformer', features_only=form == 'pyramid').state_dict()
    with pytest.raises(CheckpointError, match=r'^crossformer_tiny: 52 .* It is of another variant: try test_cross'):
        _load_into(way, checkpoint, tmp_path / 'weights.pth')
