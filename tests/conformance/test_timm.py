"""timm's own tests, of exactly the version that is installed, on the models of this package: `make conformance`.

fetch.py downloads them; nothing of theirs is kept here. While a file of theirs is imported, timm's lists of models hold
ours alone, so a test of theirs that goes through such a list is taken as it is. Tests that they run on models by name
are run on ours where they ask what any model can answer: `NAMED`. What is left out stands in `LEFT_OUT`, with reasons.
The environment variable VARIANTS says on which models: `all`, or by default `SMALL`, one per kind of network.
"""
import fnmatch
import importlib
import inspect
import os
import sys
from functools import wraps
from pathlib import Path

import pytest
import timm
import timm.models
from fetch import CACHE, PACKAGE

import timm_crossformer
from timm_crossformer.checkpoints.fitting import convert_state_dict

if not (CACHE / PACKAGE).is_dir():
    pytest.skip('`make conformance` fetches the tests of timm', allow_module_level=True)

MODULE = 'crossformer'  # ours, in timm's registry
SMALL = ['crossformer_lucidrains', 'crossformer_pp_small', 'crossformer_tiny', 'test_crossformer']
NAMES = timm.list_models(module=MODULE) if os.environ.get('VARIANTS') == 'all' else SMALL
BUNDLED = [tag for name in NAMES for tag, cfg in timm.models.get_arch_pretrained_cfgs(name).items()
           if cfg.file and Path(cfg.file).is_file()]
TEST = 'test_crossformer'


def listed(filter='', module='', pretrained=False, exclude_filters='', name_matches_cfg=False, include_tags=None):
    """List models as timm does, ours alone, as if our module were among those that are asked for.

    With `pretrained`, those whose weights need no network.
    """
    modules = [module] if isinstance(module, str) else list(module)
    names = list_models(
        filter, [*modules, MODULE] if any(modules) else '', pretrained, exclude_filters, name_matches_cfg, include_tags)
    return [name for name in names if name.partition('.')[0] in NAMES and (not pretrained or name in BUNDLED)]


def load(name):
    """Import a file of timm's tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (timm, timm.models):
            patch.setattr(module, 'list_models', listed)
            patch.setattr(module, 'list_pretrained', lambda *args, **kwargs: [])
        return importlib.import_module(f'{PACKAGE}.{name}')


def goes_through_a_list(test):
    """Tell whether a test of timm is parametrized with models of ours."""
    values = [mark.args[1] for mark in getattr(test, 'pytestmark', ())
              if mark.name == 'parametrize' and mark.args[0] == 'model_name']
    return bool(values and values[0]) and all(value.partition('.')[0] in NAMES for value in values[0])


def on_ours(test, names, values):
    """Copy a test of timm, parametrized anew."""
    @wraps(test)
    def copy(*args, **kwargs):
        return test(*args, **kwargs)

    others = [mark for mark in getattr(test, 'pytestmark', ()) if mark.name != 'parametrize' or mark.args[0] != names]
    copy.pytestmark = others
    return pytest.mark.parametrize(names, values)(copy)


def with_kwargs(*rows):
    return [(name, *row) for name in SMALL for row in rows]


sys.path.insert(0, str(CACHE))
for file in ('test_models', 'test_model_input', 'test_optim', 'test_prune', 'test_utils'):
    pytest.register_assert_rewrite(f'{PACKAGE}.{file}')
list_models = timm.list_models
models = load('test_models')

LISTED = {name: test for name, test in vars(models).items()
          if name.startswith('test_') and inspect.isfunction(test) and goes_through_a_list(test)}

NAMED = {
    # file: {test: (names of its arguments, values)}
    'test_models': {
        'test_reset_classifier_keeps_pool': ('model_name', SMALL),
        'test_features_only_grad_checkpointing_backward': ('model_name', SMALL),
        'test_pruned_features_torchscript': ('model_name', SMALL),
        'test_feature_getter_stage_ends_torchscript': ('model_name', SMALL),
        'test_prune_intermediate_layers_params_used': ('model_name', SMALL),
        'test_head_hidden_size': ('model_name, model_kwargs', with_kwargs([{}])),
        'test_features_only_feature_cls_class': ('model_name', SMALL),
        'test_prune_intermediate_layers_last_feature': ('model_name,stop_early_final', with_kwargs([True])),
        'test_forward_intermediates_stop_early_final_norm': ('model_name,model_kwargs', with_kwargs([{}])),
        'test_swin_family_reinit_after_to_empty': ('model_name,img_size', [(TEST, 224)]),
        'test_headless_checkpoint_reload': ('model_name,kwargs', with_kwargs([{}])),
        'test_relpos_non_square_checkpoint_reload': ('model_name,kwargs', with_kwargs([{}])),
        'test_relpos_non_square_set_input_size': ('model_name,kwargs', with_kwargs([{}])),
        'test_relpos_family_set_input_size': (
            'model_name,kwargs,img_size,new_size', with_kwargs([{}, 224, 256], [{}, 160, 96])),
    },
    'test_model_input': {
        'test_default_resize_hub_roundtrip': (
            'name,kwargs,img_size,new_size',
            with_kwargs([{}, 160, 224], [dict(group_size=(7, 7, 14, 7), lda_grouping='region'), 112, 224])),
    },
    'test_optim': {
        'test_param_groups_layer_decay_trunk_layer': ('model_name,param_name,expected_name', [
            (name, 'stages.1.downsample.convs.0.weight', 'stages.1.blocks.0.norm1.weight') for name in SMALL]),
    },
    'test_prune': {'test_pruned_feature_info_matches_forward': ('model_name', SMALL)},
    'test_utils': {'test_freeze_unfreeze_root_parameters': ('model_name', SMALL)},
}
NAMED_TESTS = {
    name: on_ours(getattr(load(file), name), *arguments)
    for file, tests in NAMED.items() for name, arguments in tests.items()
}
globals().update(LISTED, **NAMED_TESTS)
cfg_device = models.cfg_device

LEFT_OUT = {
    # pattern: reason
    'test_model_inference': 'compares with tensors that lie on the Hub, beside weights of timm',
    'test_model_default_cfgs_non_std': 'of models that do not fit test_model_default_cfgs; ours do',
    'test_forward_after_prune_intermediate_layers': 'of networks without a final norm',
    'test_model_forward_torchscript_with_features_fx': 'of models without a feature_cfg of their own',
    'test_feature_hook_net_grad_checkpointing_order': 'of features by hooks; ours come from stages',
    'test_model_features_output_stride': 'of models with dilation',
    'test_prune_*stem*': 'of networks whose first feature is the stem',
    'test_prune_class_token_avg_pool': 'of networks with a class token',
    'test_catavgmax_unsupported': 'of models that refuse this pooling; ours take it',
    'test_model_init_weights_after_to_empty': 'of models with a method init_weights, which timm calls in no place',
    'test_*attention*cache*': 'of biases that are parameters; ours are computed',
    'test_eval_attention_forward_after_dtype_change': 'the same',
    'test_swin_family_*': 'of windows; test_swin_family_reinit_after_to_empty is run',
    'test_*vit_*': 'of other networks',
    'test_pruned_efficientnet_*': 'of other networks',
    'test_convit_*': 'of other networks',
    'test_model_features_space2depth_*': 'of other networks',
    'test_inception_*': 'of other networks',
    'test_eva_*': 'of other networks',
    'test_resnet*': 'of other networks',
    'test_nfnet_*': 'of other networks',
    'test_mobile*': 'of other networks',
    'test_radio_*': 'of other networks',
    'test_gemma4_*': 'of other networks',
    'test_efficientvim_*': 'of other networks',
}


def test_nothing_of_timm_is_left_out_without_a_reason():
    tests = {name for name, test in vars(models).items() if name.startswith('test_') and inspect.isfunction(test)}
    left_out = tests - set(LISTED) - set(NAMED_TESTS)
    without = [name for name in left_out if not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)]
    assert not without, f'new in timm {timm.__version__}: {sorted(without)}. Run them in NAMED, or say why not.'
    unused = [pattern for pattern in LEFT_OUT if not fnmatch.filter(left_out, pattern)]
    assert not unused, f'gone from timm {timm.__version__}, or run: {unused}'


def test_lists_of_timm_hold_our_models():
    for name in ('test_model_forward', 'test_model_backward', 'test_model_forward_intermediates'):
        values = next(m.args[1] for m in LISTED[name].pytestmark if m.args[:1] == ('model_name',))
        assert sorted(values) == sorted(NAMES)


@pytest.fixture(autouse=True)
def _filter(monkeypatch):
    """Show the filter of checkpoints where timm's tests look for it, in the file of the model's class."""
    monkeypatch.setattr(timm_crossformer.model, 'checkpoint_filter_fn', convert_state_dict, raising=False)
