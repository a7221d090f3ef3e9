"""timm's contract, one test per promise, over all variants (compare timm's tests/test_models.py)."""
import copy
import json

import pytest
import timm
import torch
from common import VARIANTS, noise, small
from timm.models import FeatureGraphNet, create_feature_extractor
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

QUICK = ('crossformer_pp_small', 'crossformer_lucidrains', 'test_crossformer')
ALL = pytest.mark.parametrize('variant', [
    pytest.param(v, marks=[] if v in QUICK else [pytest.mark.slow]) for v in VARIANTS])


def meta(variant, **kwargs):
    """Build a variant without memory: shapes only."""
    return timm.create_model(variant, device='meta', **kwargs).eval()


def empty(*shape):
    return torch.empty(*shape, device='meta')


@ALL
def test_default_cfg(variant):
    model = meta(variant)
    cfg = model.default_cfg
    assert (cfg['interpolation'], cfg['license']) == ('bicubic', 'mit')
    assert cfg['crop_pct'] == (1.0 if variant == 'test_crossformer' else 0.875)
    assert cfg['paper_ids'].startswith('arXiv:')
    assert cfg['origin_url'].startswith('https://')
    assert len(cfg['first_conv']) == 4
    weights = model.state_dict()
    assert all(f'{name}.weight' in weights for name in (*cfg['first_conv'], cfg['classifier']))
    features = model.forward_features(empty(1, *cfg['input_size']))
    assert tuple(features.shape) == (1, model.num_features, *cfg['pool_size'])


@ALL
def test_registry(variant):
    assert timm.is_model(variant)
    assert variant in timm.list_models(module='crossformer')
    assert type(meta(variant)).__module__ == 'timm_crossformer.model'


def test_names_of_others_are_not_taken():
    from timm_crossformer.crossformer import _register

    def resnet50(pretrained=False, **kwargs):
        raise AssertionError

    with pytest.raises(ImportError, match=r'timm already has a model `resnet50`, from timm\.models\.resnet'):
        _register(resnet50)
    assert timm.model_entrypoint('resnet50').__module__ == 'timm.models.resnet'


@ALL
def test_forward_and_heads(variant):
    model = meta(variant, num_classes=7, in_chans=1, drop_path_rate=0.1)
    x = empty(2, 1, 160, 160)
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, model.num_features, 5, 5)
    model.reset_classifier(4, 'catavgmax')
    assert model(x).shape == (2, 4)
    assert model.head_hidden_size == 2 * model.num_features


@ALL
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_features_only(variant, feature_cls):
    if feature_cls == 'hook':
        model = timm.create_model(variant, features_only=True, feature_cls='hook')
        outputs = model(torch.zeros(1, 3, 96, 65))
    else:
        model = meta(variant, features_only=True, feature_cls=feature_cls)
        outputs = model(empty(1, 3, 96, 65))
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    channels = model.feature_info.channels()
    assert [tuple(o.shape) for o in outputs] == [
        (1, c, -(-96 // r), -(-65 // r)) for c, r in zip(channels, (4, 8, 16, 32), strict=True)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.module_name() == [f'stages.{i}' for i in range(4)]


@pytest.mark.parametrize('indices', [(0,), (1, 2), (3,), (1, 3), (-1,), 2], ids=str)
def test_out_indices(indices):
    whole = timm.create_model('test_crossformer', features_only=True).eval()
    part = timm.create_model('test_crossformer', features_only=True, out_indices=indices).eval()
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    x = noise(1, 3, 70, 90)
    wanted = range(4)[-indices:] if isinstance(indices, int) else [range(4)[i] for i in indices]
    expected = whole(x)
    for output, i in zip(part(x), wanted, strict=True):
        assert torch.equal(output, expected[i])


def test_forward_intermediates():
    model, x = small(), noise(2, 3, 70, 90)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == 4
    for args, picked in ((dict(indices=2), maps[2:]), (dict(indices=[0, -1]), [maps[0], maps[3]])):
        only = model.forward_intermediates(x, intermediates_only=True, **args)
        assert all(torch.equal(a, b) for a, b in zip(only, picked, strict=True))
    nhwc = model.forward_intermediates(x, output_fmt='NHWC', intermediates_only=True)
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(nhwc, maps, strict=True))
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], final)
    assert torch.equal(normed[0], maps[0])
    early, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(early, maps[1])
    with pytest.raises(ValueError, match="`output_fmt` is 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('last', [0, 1, 2, 3])
def test_prune_intermediate_layers(last):
    model, x = small(), noise(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)[last]
    assert model.prune_intermediate_layers([last]) == [last]
    assert len(model.stages) == last + 1
    assert torch.equal(model.forward_intermediates(x, indices=[last], intermediates_only=True)[0], expected)
    assert model(x).shape == (1, model.feature_info[last]['num_chs'], *expected.shape[2:])
    assert isinstance(model.norm, torch.nn.Identity) == (last < 3)


@ALL
def test_group_matcher_covers_every_parameter(variant):
    model = meta(variant)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(
            name for name, _ in model.named_parameters())
        assert len(groups) == 2 + (len(model.depths) if coarse else sum(model.depths))  # stem, blocks, norm and head


def test_layer_decay_grows_with_depth():
    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for p in group['params']:
            scale[names[id(p)]] = group['lr_scale']
    order = ['stem.convs.0.weight', 'stages.0.blocks.0.mlp.fc1.weight', 'stages.0.blocks.1.mlp.fc1.weight',
             'stages.1.blocks.0.attn.qkv.weight', 'stages.3.blocks.1.attn.qkv.weight', 'head.fc.weight']
    assert [scale[name] for name in order] == sorted(scale[name] for name in order)
    assert len({scale[name] for name in order}) == len(order)
    assert scale['stages.1.downsample.convs.0.weight'] <= scale['stages.1.blocks.0.attn.qkv.weight']


def test_weight_decay_follows_the_official_recipe():
    model = small()
    assert model.no_weight_decay() == set()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = set()
    for group in param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay()):
        if group['weight_decay']:
            decayed |= {names[id(p)] for p in group['params']}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = small().train(), small().train()
    saving.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in saving.stages)
    for model in (plain, saving):
        model(noise(2, 3, 64, 64)).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_set_input_size_is_recorded_and_rebuilds(tmp_path):
    model = small()
    model.set_input_size((96, 160), group_size=((2, 3), 4, 4, 4), interval=2, lda_grouping='region', fit_groups=True)
    x = noise(1, 3, 96, 160)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['model_args']['img_size'] == [96, 160]
    assert config['model_args']['lda_grouping'] == 'region'
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError):
        model.set_input_size(group_size=0)
    assert torch.equal(again(x), model(x))  # a refused change leaves the model as it was


@ALL
def test_meta_device_construction_and_materialisation(variant):
    model = meta(variant)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    if variant == 'test_crossformer':
        model = model.to_empty(device='cpu')
        model.load_state_dict(timm.create_model(variant).state_dict())
        assert model(noise(1, 3, 64, 64)).isfinite().all()


def test_device_and_dtype_arguments_reach_every_module():
    model = timm.create_model('test_crossformer', dtype=torch.bfloat16, cooling=True, depths=(4, 1, 1, 1))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_channels_last_input_gives_the_same_result():
    model, x = small(), noise(2, 3, 70, 90)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))
    torch.testing.assert_close(copy.deepcopy(model).to(memory_format=torch.channels_last)(x), model(x))


def test_stages_take_and_return_nchw():
    model, seen = small(), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    model(noise(2, 3, 64, 96))
    assert [(tuple(a)[1:], tuple(b)[1:]) for a, b in seen] == [
        ((32, 16, 24), (32, 16, 24)), ((32, 16, 24), (48, 8, 12)), ((48, 8, 12), (64, 4, 6)), ((64, 4, 6), (96, 2, 3))]


def test_head_pools_nchw():
    model = small()
    features = model.forward_features(noise(2, 3, 64, 96))
    torch.testing.assert_close(model.head.global_pool(features), features.mean((2, 3)))


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*:FutureWarning')  # torch announces the end of TorchScript
@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*:DeprecationWarning')
@pytest.mark.parametrize('features_only', [False, True], ids=['classifier', 'features'])
def test_torchscript(features_only):
    model = timm.create_model('test_crossformer', features_only=features_only, cooling=True, scriptable=True).eval()
    scripted = torch.jit.script(model)
    for size in ((64, 64), (33, 97), (1, 1)):
        x = noise(1, 3, *size)
        result, expected = scripted(x), model(x)
        for a, b in zip(result if features_only else [result], expected if features_only else [expected], strict=True):
            torch.testing.assert_close(a, b)


def test_fx_feature_extraction():
    model = small().train()
    extractor = create_feature_extractor(model, {'stages.1': 'middle', 'head.fc': 'logits'})
    for size in ((64, 64), (75, 33)):
        outputs = extractor(noise(2, 3, *size))
        assert outputs['middle'].shape[1] == 48
        outputs['logits'].sum().backward()
    assert FeatureGraphNet(small(), out_indices=(0, 1, 2, 3))(noise(1, 3, 40, 40))[3].shape == (1, 96, 2, 2)


def test_unexpected_and_missing_keys_are_errors():
    model = small()
    weights = model.state_dict()
    with pytest.raises((RuntimeError, ValueError), match=r'stages\.9'):
        small().load_state_dict(dict(weights, **{'stages.9.x': torch.zeros(1)}))
    del weights['stages.0.blocks.0.norm1.weight']
    with pytest.raises((RuntimeError, ValueError), match=r'stages\.0\.blocks\.0\.norm1\.weight'):
        small().load_state_dict(weights)
