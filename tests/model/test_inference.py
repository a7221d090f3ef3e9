"""The inference form: the same numbers as the model, at every size, or an error."""
import copy
import pickle
import subprocess
import sys
import threading

import pytest
import timm
import torch
from common import GROUPINGS, fakes_cuda, lively, noise, small
from timm.layers import Mlp
from timm.utils import reparameterize_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer
from timm_crossformer import inference
from timm_crossformer.fixed import fix
from timm_crossformer.inference import InferenceAttention, InferenceBlock, PackedConv, PackedLinear
from timm_crossformer.layers import CrossFormerBlock, DynamicPosBias, GroupAttention
from timm_crossformer.ops.grouping import map_layout

SIZES = ((64, 64), (75, 190), (20, 300), (33, 7))
KINDS = {
    **{grouping: dict(lda_grouping=grouping) for grouping in GROUPINGS},
    'pp': dict(cooling=True, group_size=((4, 4), 4, (14, 7), 7)),
    'lucidrains': dict(pos_bias='lucidrains', lda_grouping='grid', stage_norm=False, qkv_bias=False),
    'others': dict(norm_layer='rmsnorm', act_layer='silu', fit_groups=True, head_dim=5),
    'tanh': dict(act_layer='gelu_tanh'),
    'rates': dict(drop_path_rate=.2, proj_drop_rate=.1, attn_drop_rate=.1, drop_rate=.1),
}


def assert_same(found, expected, eps=1e-5):
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps * expected.double().std().item())


@pytest.mark.parametrize('part', [20_000, 1 << 19])
@pytest.mark.parametrize('kind', KINDS)
def test_numbers_are_those_of_the_model(kind, part, monkeypatch):
    monkeypatch.setattr(inference, '_PART', part)
    model = small(**KINDS[kind])
    forms = [reparameterize_model(model), timm_crossformer.reparameterize(model, img_size=(75, 190))]
    for form in forms:
        blocks = [module for module in form.modules() if isinstance(module, InferenceBlock)]
        assert len(blocks) == 10 and all(block.is_as_made() for block in blocks)  # so wide maps go in parts
        assert not any(isinstance(module, CrossFormerBlock | GroupAttention) for module in form.modules())
    with torch.no_grad():
        for size in SIZES:
            x = noise(3, 3, *size)
            for form in forms:
                assert_same(form(x), model(x))
                for a, b in zip(form.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
                    assert_same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['crossformer_tiny', 'crossformer_pp_small', 'crossformer_lucidrains'])
def test_variants(variant):
    model = lively(timm.create_model(variant, features_only=True))
    form = reparameterize_model(model)
    with torch.no_grad():
        for size in ((224, 224), (230, 310)):
            for a, b in zip(form(noise(1, 3, *size)), model(noise(1, 3, *size)), strict=True):
                assert_same(a, b)


@pytest.mark.parametrize(('dtype', 'eps'), [(torch.float64, 1e-12), (torch.bfloat16, .03), (torch.float16, .004)])
def test_precisions(dtype, eps):
    model, x = small().to(dtype), noise(2, 3, 75, 190).to(dtype)
    with torch.no_grad():
        for form in (reparameterize_model(model), reparameterize_model(small()).to(dtype)):
            torch.testing.assert_close(form(x), model(x), rtol=0, atol=eps * model(x).abs().max().item())


def test_an_image_size_makes_tables_that_serve_it(monkeypatch):
    form = timm_crossformer.reparameterize(small(lda_grouping='map'), img_size=(128, 192))
    monkeypatch.setattr(timm_crossformer.layers.DynamicPosBias, 'forward', None)  # so it may not be called
    with torch.no_grad():
        form(noise(1, 3, 128, 192))
        form(noise(1, 3, 128, 160))
        with pytest.raises(TypeError):
            form(noise(1, 3, 128, 256))


class Launches(TorchDispatchMode):
    """Name the operators that launch work."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        result = out[0] if isinstance(out, tuple) else out
        if isinstance(result, torch.Tensor) and not (func.is_view or 'view' in str(func) or 'empty' in str(func)):
            self.names.append(func.overloadpacket.__name__)
        return out


@fakes_cuda
@pytest.mark.parametrize('variant', ['crossformer_small', 'crossformer_pp_small'])
def test_a_block_on_cuda_is_ten_launches(variant, monkeypatch):
    monkeypatch.setattr('timm_crossformer.ops.triton.is_installed', lambda: True)
    model = timm.create_model(variant, num_classes=0).eval()
    form = reparameterize_model(model)
    with FakeTensorMode(), torch.no_grad():
        form._apply(lambda t: torch.empty(t.shape, dtype=torch.bfloat16, device='cuda'))
        for size in ((224, 224), (320, 320)):
            if size == (320, 320) and variant == 'crossformer_small':
                continue  # groups of 'map' are larger there than the table
            x = torch.empty(1, *([56 * size[0] // 224] * 2), model.feature_info[0]['num_chs'], device='cuda',
                            dtype=torch.bfloat16)
            with Launches() as launches:
                form.stages[0].blocks[1](x)
            assert sorted(launches.names) == sorted(
                ['native_layer_norm', 'addmm', 'grouped_attention', 'addmm', 'add',
                 'native_layer_norm', 'addmm', 'gelu', 'addmm', 'add'])


# ---- what is not ours stays


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Mixing(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean((1, 2), keepdim=True)


class OtherBlock(CrossFormerBlock):
    def forward(self, x):
        return super().forward(2 * x)


def other_class(block):
    block.__class__ = OtherBlock


def dropout_that_is_on(block):
    block.mlp.drop2 = nn.Dropout(1.)  # as for uncertainty by dropout, but not by chance
    block.eval().mlp.drop2.train()


def weight_that_is_no_parameter(block):
    weight = block.mlp.fc1.weight
    del block.mlp.fc1.weight
    block.mlp.fc1.weight = 2 * weight.detach()


CHANGES = {
    'mlp': lambda block: setattr(block, 'mlp', Mixing(block.mlp)),
    'norm': lambda block: setattr(block, 'norm1', Mixing(block.norm1)),
    'norm that is a linear layer': lambda block: setattr(block, 'norm2', nn.Linear(64, 64)),
    'drop path': lambda block: setattr(block, 'drop_path1', nn.LayerNorm(64, elementwise_affine=False)),
    'attention': lambda block: setattr(block, 'attn', nn.Identity()),
    'projection': lambda block: setattr(block.attn, 'proj', nn.Sequential(block.attn.proj, Doubling())),
    'position bias': lambda block: setattr(block.attn.pos_bias, 'mlp', nn.Sequential(block.attn.pos_bias.mlp)),
    'one layer of the position bias': lambda block: block.attn.pos_bias.mlp.append(Doubling()),
    'parametrisation': lambda block: nn.utils.parametrizations.weight_norm(block.mlp.fc1),
    'forward': lambda block: setattr(block.mlp, 'forward', Doubling().forward),
    'forward of the block': lambda block: setattr(block, 'forward', Doubling().forward),
    'hook': lambda block: block.mlp.fc1.register_forward_hook(lambda module, args, out: out.sin()),
    'pre-hook': lambda block: block.attn.pos_bias.mlp[3].register_forward_pre_hook(lambda module, args: args[0].sin()),
    'hook of the block': lambda block: block.register_forward_hook(lambda module, args, out: out.sin()),
    'class': other_class,
    'groups': lambda block: setattr(block.attn, 'layouts', lambda height, width: ((height, 1, 1), (width, 1, 1))),
    'dropout that is on': dropout_that_is_on,
    'norm over the map': lambda block: setattr(block, 'norm2', nn.LayerNorm((5, 7, 64))),
    'weight that is no parameter': weight_that_is_no_parameter,
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_somebody_changed_stays_and_is_called(change, monkeypatch):
    monkeypatch.setattr(inference, '_PART', 100)
    model, x = small(), noise(1, 3, 70, 101)
    if change == 'position bias':
        layers = model.stages[2].blocks[1].attn.pos_bias.mlp
        model.stages[2].blocks[1].attn.pos_bias = type('Bias', (nn.Module,), dict(
            forward=lambda self, offsets: 3 * layers(offsets).permute(2, 0, 1)))()
    else:
        before = model(x)
        CHANGES[change](model.stages[2].blocks[1])
        assert (model(x) - before).abs().max() > 1e-3 or change == 'parametrisation'
    form = reparameterize_model(model)
    assert not isinstance(form.stages[2].blocks[1], InferenceBlock)
    assert isinstance(form.stages[2].blocks[0], InferenceBlock)
    with torch.no_grad():
        assert_same(form(x), model(x))


@pytest.mark.parametrize('name', ['forward', '__call__', '_call_impl'])
@pytest.mark.parametrize('kind', [CrossFormerBlock, GroupAttention, DynamicPosBias, Mlp, nn.Linear, nn.Conv2d])
def test_a_class_that_somebody_patched_is_called(kind, name, monkeypatch):
    model, x = small(), noise(1, 3, 70, 101)
    before, method = model(x), getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *args: method(self, *args).sin())
    form = reparameterize_model(model)
    with torch.no_grad():
        assert (model(x) - before).abs().max() > 1e-3
        assert_same(form(x), model(x))
    left = [module for module in form.stages.modules() if isinstance(module, (InferenceBlock, PackedConv))]
    assert all(isinstance(module, PackedConv) == (kind is not nn.Conv2d) for module in left) and left


PATCH_AND_IMPORT = '''
import torch
forward = torch.nn.Linear.forward
torch.nn.Linear.forward = lambda self, x: forward(self, x).sin()
import timm, timm_crossformer
model = timm.create_model("test_crossformer", pretrained=True).eval()
x = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    torch.testing.assert_close(timm.utils.reparameterize_model(model)(x), model(x))
'''


def test_a_class_that_was_patched_before_the_import_is_called():
    subprocess.run([sys.executable, '-c', PATCH_AND_IMPORT], check=True)


class Sines(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.sin() if func is nn.functional.linear else out


def test_a_mode_sees_the_functions_of_the_form():
    model, x = small(), noise(1, 3, 70, 101)
    with torch.no_grad(), Sines():
        form = reparameterize_model(model)
        assert_same(form(x), model(x))


WATCHED = ('', 'attn_norm', 'attn', 'attn.qkv', 'attn.proj', 'attn.position', 'mlp_norm', 'mlp', 'mlp.0', 'mlp.2')


def sine(module, args, out):
    return out.sin()


@pytest.mark.parametrize('name', WATCHED)
@pytest.mark.parametrize('fixed', [False, True])
def test_a_hook_of_the_form_acts_on_maps_of_every_size(name, fixed, monkeypatch):
    form, x = reparameterize_model(small()), noise(1, 3, 70, 101)
    form.stages[1].blocks[1].get_submodule(name).register_forward_hook(sine)
    if name == 'attn.position':
        form.stages[1].blocks[1].attn.table = form.stages[1].blocks[1].attn.table[:, 1:-1, 1:-1]  # so it is asked
    with torch.no_grad():
        whole = form(x)
        assert (whole - reparameterize_model(small())(x)).abs().max() > 1e-3
        monkeypatch.setattr(inference, '_PART', 100)
        assert_same((fix(form, x) if fixed else form)(x), whole)


FORM_CHANGES = {
    'attention': lambda block: setattr(block, 'attn', nn.Identity()),
    'attention as a linear layer': lambda block: setattr(block, 'attn', nn.Linear(48, 48)),
    'query, key, value': lambda block: setattr(block.attn, 'qkv', nn.Sequential(block.attn.qkv, Doubling())),
    'mlp': lambda block: setattr(block, 'mlp', Mixing(block.mlp)),
    'a layer of the mlp': lambda block: block.mlp.append(Mixing(nn.Identity())),
    'norm': lambda block: setattr(block, 'attn_norm', Mixing(block.attn_norm)),
    'forward of attention': lambda block: setattr(block.attn, 'forward', Doubling().forward),
    'forward of the mlp': lambda block: setattr(block.mlp, 'forward', Mixing(nn.Identity()).forward),
    'groups': lambda block: setattr(block.attn, 'layouts', lambda height, width: ((height, 1, 1), (width, 1, 1))),
}


@pytest.mark.parametrize('change', FORM_CHANGES)
@pytest.mark.parametrize('fixed', [False, True])
def test_what_somebody_changed_in_the_form_acts_on_maps_of_every_size(change, fixed, monkeypatch):
    form, x = reparameterize_model(small()), noise(1, 3, 70, 101)
    with torch.no_grad():
        before = form(x)
        FORM_CHANGES[change](form.stages[1].blocks[1])
        whole = form(x)
        assert (whole - before).abs().max() > 1e-3
        monkeypatch.setattr(inference, '_PART', 100)
        assert_same((fix(form, x) if fixed else form)(x), whole)


@pytest.mark.parametrize('change', [
    dict(padding_mode='circular'), dict(dilation=2, kernel_size=3, padding=2), dict(groups=2),
    dict(kernel_size=(4, 2), padding=(1, 0)), dict(padding=(1, 1), stride=2)], ids=str)
def test_convolutions_of_every_kind(change):
    model, x = small(), noise(2, 3, 70, 101)
    args = {**dict(in_channels=32, out_channels=24, kernel_size=4, stride=2, padding=1), **change}
    model.stages[1].downsample.convs[1] = nn.Conv2d(**args)
    form = reparameterize_model(model)
    assert isinstance(form.stages[1].downsample.convs[1], PackedConv) == (change.get('stride') == 2)
    with torch.no_grad():
        assert_same(form(x), model(x))


def test_a_convolution_of_its_own_forward_stays():
    model, x = small(), noise(2, 3, 70, 101)
    conv = model.stages[1].downsample.convs[1]
    conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, 2 * weight, bias, 2, 1)
    with torch.no_grad():
        assert_same(reparameterize_model(model)(x), model(x))


# ---- what it is not for


def test_it_does_not_train():
    form = reparameterize_model(small())
    assert not any(p.requires_grad for stage in form.stages for block in stage.blocks for p in block.parameters())
    form.train()
    with pytest.raises(ValueError, match=r'does not train.*Call `eval\(\)`'):
        form(noise(1, 3, 64, 64))
    form.eval()(noise(1, 3, 64, 64))


@pytest.mark.parametrize('features_only', [False, True])
def test_state_dicts_are_of_one_form(features_only):
    def make(**args):
        model = timm.create_model('test_crossformer', features_only=features_only, lda_grouping='map')
        lively(model)
        return model, timm_crossformer.reparameterize(model, **args)

    model, form = make(img_size=256)
    with pytest.raises(ValueError, match='reparameterized for inference'):
        form.load_state_dict(model.state_dict())
    _, other = make()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(form.state_dict())
    x = noise(1, 3, 256, 200)
    with torch.no_grad():
        torch.testing.assert_close(other(x), form(x), rtol=0, atol=0)
    with pytest.raises((ValueError, RuntimeError), match='reparameterize'):
        model.load_state_dict(form.state_dict())


@pytest.mark.parametrize('img_size', [(64,), (64, 64, 64), '64', 64., -1, True], ids=str)
def test_image_sizes_that_are_none(img_size):
    with pytest.raises(ValueError, match=r'`img_size` (needs whole numbers|is a number or a pair)'):
        timm_crossformer.reparameterize(small(), img_size=img_size)


def test_models_that_take_no_image_alone():
    wrapper = nn.Sequential(nn.Conv2d(1, 3, 1), small())
    with pytest.raises(ValueError, match=r'take an image alone, here \[1, 3, 64, 64\], and the Sequential does not'):
        timm_crossformer.reparameterize(wrapper, img_size=64)
    model = small()
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)  # of this model, also in a copy
    with pytest.raises(ValueError, match='runs other layers than those of the copy'):
        timm_crossformer.reparameterize(model, img_size=64)


def test_blocks_called_by_keyword_and_models_to_be_compiled():
    class Stage(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage = stage

        def forward(self, x):
            x = self.stage.downsample(x).permute(0, 2, 3, 1)
            for block in self.stage.blocks:
                x = block(x=x)
            return x.permute(0, 3, 1, 2)

    model, x = small(), noise(1, 3, 130, 130)
    model.stages[0] = Stage(model.stages[0])
    form = timm_crossformer.reparameterize(torch.compile(model), img_size=130)
    assert form.stages[0].stage.blocks[1].attn.table.shape[1] > 13
    with torch.no_grad():
        assert_same(form(x), model(x))


def test_layers_of_the_form_tell_their_shapes():
    model, x = small(), noise(1, 3, 64, 64)
    model.stages[0].register_forward_hook(lambda stage, args, out: out * stage.blocks[0].attn.qkv.in_features)
    model.stages[1].register_forward_hook(lambda stage, args, out: out * stage.downsample.convs[0].kernel_size[0])
    with torch.no_grad():
        assert_same(reparameterize_model(model)(x), model(x))


def test_groups_are_chosen_before():
    with pytest.raises(ValueError, match='before it is reparameterized'):
        reparameterize_model(small()).set_input_size(group_size=3)
    with pytest.raises(ValueError, match='needs a CrossFormer'):
        timm_crossformer.reparameterize(nn.Linear(2, 2))


# ---- right under everything


@pytest.mark.parametrize('change', [
    'in place', 'replaced', 'load', 'data', 'data in place', 'numpy', 'vector', 'load in inference mode'])
def test_a_packed_weight_is_never_older_than_the_weight(change):
    with torch.inference_mode(change == 'load in inference mode'):
        form = reparameterize_model(small())
    x = noise(1, 3, 64, 64)
    with torch.inference_mode() if change == 'load in inference mode' else torch.no_grad():
        form(x)
        for layer in (form.stages[1].blocks[0].mlp[0], form.stages[1].downsample.convs[0]):
            assert layer._packed.entry is not None
            if change == 'in place':
                layer.weight.mul_(2)
            elif change == 'replaced':
                layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)
            elif change == 'data in place':
                layer.weight.data.mul_(2)
            elif change == 'numpy':
                layer.weight.numpy()[:] *= 2
            elif change == 'vector':
                vector = nn.utils.parameters_to_vector([layer.weight])
                nn.utils.vector_to_parameters(vector, [layer.weight])
                form(x)
                vector.mul_(2)
            elif change.startswith('load'):
                layer.load_state_dict({**layer.state_dict(), 'weight': 2 * layer.weight})
            else:
                layer.weight.data = 2 * layer.weight
        found = form(x)
        for layer in (form.stages[1].blocks[0].mlp[0], form.stages[1].downsample.convs[0]):
            assert layer._packed.entry is not None  # or nothing is tested
            layer._packed.entry = None
        torch.testing.assert_close(found, form(x), rtol=0, atol=0)


def test_weights_of_a_call_are_used_in_it():
    model, x, name = small(), noise(1, 3, 64, 64), 'stages.1.blocks.0.mlp.0.weight'
    form = reparameterize_model(model)
    weight = form.get_parameter(name).clone()
    with torch.no_grad():
        for factor in range(1, 7):
            found = functional_call(form, {name: factor * weight}, x)  # where the one before was, perhaps
            form.get_parameter(name).copy_(factor * weight)
            torch.testing.assert_close(found, form(x), rtol=1e-4, atol=1e-4)


def test_tied_weights_stay_tied():
    model = small()
    model.stages[2].blocks[1].mlp.fc1.weight = model.stages[2].blocks[0].mlp.fc1.weight
    first, second = reparameterize_model(model).double().stages[2].blocks[:2]
    assert first.mlp[0].weight is second.mlp[0].weight
    assert model.stages[2].blocks[0].mlp.fc1.weight.requires_grad


@pytest.mark.parametrize('part', [100, 1 << 19])
def test_weights_that_somebody_lets_learn_get_gradients(part, monkeypatch):
    monkeypatch.setattr(inference, '_PART', part)
    model, x = small(), noise(1, 3, 70, 101)
    form = reparameterize_model(model)
    grads = []
    for network, name in ((model, 'stages.1.blocks.0.mlp.fc1.bias'), (form, 'stages.1.blocks.0.mlp.0.bias')):
        p = network.requires_grad_(False).get_parameter(name).requires_grad_()
        grads.append(torch.autograd.grad(network(x).square().sum(), p)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())


def parametrised(form):
    nn.utils.parametrize.register_parametrization(form.stages[1].blocks[0].mlp[0], 'weight', nn.Identity())
    with torch.no_grad():
        form(noise(1, 3, 64, 64))
    return copy.deepcopy(form)


def pickled(form):
    return pickle.loads(pickle.dumps(form))


@pytest.mark.parametrize('copy_of', [copy.deepcopy, pickled, reparameterize_model, parametrised])
def test_copies(copy_of):
    form, x = reparameterize_model(small()), noise(1, 3, 70, 101)
    with torch.no_grad():
        expected = form(x)
        torch.testing.assert_close(copy_of(form)(x), expected, rtol=0, atol=0)


def test_gradients_of_the_image_and_counters():
    model, x = small(), noise(2, 3, 70, 101)
    form = reparameterize_model(model)
    grads = []
    for network in (model, form):
        image = x.clone().requires_grad_()
        network(image).sum().backward()
        grads.append(image.grad)
    assert_same(*grads)
    with torch.no_grad():
        flops = []
        for network in (model, form):
            with FlopCounterMode(display=False) as counter:
                network(noise(1, 3, 64, 64))
            flops.append(counter.get_total_flops())
        tables = [p for name, p in model.named_parameters() if 'pos_bias' in name and p.ndim == 2]
        assert flops[1] < flops[0] < flops[1] + 2 * sum(p.numel() for p in tables) * 15 ** 2
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(form(x), model(x), rtol=0, atol=.05 * model(x).abs().max().item())
        with torch.device('meta'):
            assert_same(form(x), model(x))


def test_threads():
    model = small()
    form, images = reparameterize_model(model), [noise(1, 3, 64 + 8 * i, 70) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    found = {}

    def run(i):
        with torch.no_grad():
            found[i] = [form(images[i]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(expected):
        for logits in found[i]:
            assert_same(logits, wanted)


@pytest.mark.filterwarnings('ignore:.torch.jit', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('way', [
    'fx', 'trace', 'script', 'export', 'export for all sizes', pytest.param('compile', marks=pytest.mark.slow)])
def test_tracers(way):
    model = small(depths=(1, 2, 2, 1))
    form, x = reparameterize_model(model), noise(2, 3, 96, 130)
    sizes = [(96, 130), *SIZES[:{'export': 0, 'export for all sizes': 2}.get(way, 3)]]  # exported from 33 pixels on
    with torch.no_grad():
        if way == 'fx':
            traced = torch.fx.symbolic_trace(form)
        elif way == 'trace':
            traced = torch.jit.trace(form, x, check_trace=False)
        elif way == 'script':
            traced = torch.jit.script(form)
        elif way == 'compile':
            traced = torch.compile(form, backend='aot_eager')
        else:
            shapes = None if way == 'export' else ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO,
                                                    3: torch.export.Dim.AUTO},)
            traced = torch.export.export(form, (x,), dynamic_shapes=shapes, strict=False).module()
        for size in sizes:
            assert_same(traced(noise(2, 3, *size)), model(noise(2, 3, *size)), eps=2e-5)


def test_parts_are_whole_groups_and_every_token_once(monkeypatch):
    monkeypatch.setattr(inference, '_PART', 40)
    for grouping in ('sda', *GROUPINGS):
        rows, cols = map_layout(23, 37, (3, 4), 3, grouping)
        seen = torch.zeros(2, 23, 37, 1)
        for place, part_rows, part_cols in inference.parts(seen, rows, cols):
            seen[place] += 1
            assert part_rows[0] * part_rows[1] * part_rows[2] >= seen[place].shape[1]
            assert part_cols[0] * part_cols[1] * part_cols[2] >= seen[place].shape[2]
        assert (seen == 1).all()


def test_modules_have_names_of_their_own():
    form = reparameterize_model(small())
    kinds = {type(module) for module in form.stages.modules()}
    assert {InferenceBlock, InferenceAttention, PackedLinear, PackedConv} <= kinds
    old = {name for name, _ in small().named_modules() if '.blocks.' in name and name.count('.') > 3}
    new = {name for name, _ in form.named_modules()}
    assert {name.split('.', 4)[4] for name in old & new} <= {'attn', 'attn.qkv', 'attn.proj', 'mlp', 'cooling'}
