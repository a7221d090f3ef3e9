"""Whoever looks inside or takes the network apart: counters, function transforms, tracers, walkers of modules."""
import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from common import lively, noise, small
from timm.layers import set_fused_attn
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

TINY = dict(num_classes=3, depths=(1, 2), embed_dim=16, num_heads=(1, 2), interval=(2, 1), group_size=3)
KINDS = {
    'map': {}, 'region': dict(lda_grouping='region'), 'grid': dict(lda_grouping='grid'),
    'pp': dict(cooling=True, group_size=((4, 4), 4, (14, 7), 7)),
    'lucidrains': dict(pos_bias='lucidrains', lda_grouping='region'), 'fit_groups': dict(fit_groups=True),
}
SIZES = ((1, 33, 97), (3, 191, 70), (1, 224, 224), (1, 33, 33))


def slow_but(quick):
    return [pytest.param(k, marks=[] if k == quick else [pytest.mark.slow]) for k in KINDS]


def shallow(kind):
    return lively(timm.create_model('test_crossformer', num_classes=10, **{**dict(depths=(2, 1, 2, 1)), **KINDS[kind]}))


def assert_same_at_every_size(run, model):
    for batch, h, w in SIZES:
        x = noise(batch, 3, h, w)
        with torch.no_grad():
            torch.testing.assert_close(torch.as_tensor(run(x)), model(x), rtol=1e-3, atol=1e-4)


# ---- counters


def _attention_flops(variant, size):
    """Count the two products of attention as the paper does, where every group is full."""
    flops, side = 0, size // 4
    for stage in timm.create_model(variant, device='meta').stages:
        for block in stage.blocks:
            side = side // 2 if block is stage.blocks[0] and not isinstance(stage.downsample, nn.Identity) else side
            group = min(block.attn.group_size[0], side)
            members = side // block.attn.interval if block.attn.grouping == 'map' and side > group else group
            flops += 4 * side ** 2 * members ** 2 * block.attn.qkv.in_features
    return flops


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['crossformer_small', 'crossformer_pp_small'])
@pytest.mark.parametrize('grad', [False, True])
def test_counters_of_pytorch_agree(variant, grad):
    model, x = timm.create_model(variant).eval(), torch.zeros(1, 3, 224, 224)
    published = 2 * {'crossformer_small': 4.91e9, 'crossformer_pp_small': 4.389e9}[variant]
    with torch.set_grad_enabled(grad):
        with FlopCounterMode(display=False) as counter:
            model(x)
        with torch.profiler.profile(with_flops=True) as profile:
            model(x)
    assert counter.get_total_flops() == pytest.approx(published, rel=.03)
    # With one thread, as here, attention is PyTorch's own fused operator, which its profiler leaves out in any model.
    profiled = sum(event.flops for event in profile.key_averages())
    assert profiled == pytest.approx(published - _attention_flops(variant, 224), rel=.01)
    torch.set_num_threads(2)  # and with several, products
    if variant == 'crossformer_small':
        with torch.set_grad_enabled(grad), torch.profiler.profile(with_flops=True) as profile:
            model(x)
        assert sum(event.flops for event in profile.key_averages()) == pytest.approx(published, rel=.01)


# ---- function transforms

no_batching_rule = pytest.mark.filterwarnings(  # and PyTorch scripts its own decompositions
    'ignore:There is a performance drop', 'ignore:.torch.jit.script')

@pytest.fixture(params=[True, False], ids=['fused', 'explicit'])
def fused(request):
    set_fused_attn(request.param)
    yield
    set_fused_attn(True)


@pytest.fixture(params=[False, True], ids=['evaluation', 'training'])
def tiny(request, fused):
    """A model in fp64, its parameters, images, and the logits as a function of parameters and images."""
    model = small(**TINY).double().train(request.param)
    params = {name: p.detach() for name, p in model.named_parameters()}
    return model, params, noise(3, 3, 21, 18).double(), lambda params, x: functional_call(model, params, (x,))


@no_batching_rule
def test_derivatives_by_transforms(tiny):
    model, params, x, logits = tiny
    label = torch.tensor([0, 1, 2])

    def loss(params, x, label):
        return F.cross_entropy(logits(params, x[None]), label[None])

    per_image = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, label)
    for i in range(3):
        expected = torch.autograd.grad(loss(dict(model.named_parameters()), x[i], label[i]), list(model.parameters()))
        for name, wanted in zip(params, expected, strict=True):
            torch.testing.assert_close(per_image[name][i], wanted)
            torch.testing.assert_close(grad(loss)(params, x[i], label[i])[name], wanted)

    for name in ('stages.1.blocks.1.attn.proj.bias', 'stages.0.blocks.0.norm1.bias'):
        def of_one(p, name=name):
            return logits({**params, name: p}, x)

        reverse, forward = jacrev(of_one)(params[name]), jacfwd(of_one)(params[name])
        torch.testing.assert_close(forward, reverse)
        torch.testing.assert_close(reverse, torch.autograd.functional.jacobian(of_one, params[name]))
        second = hessian(lambda p, of_one=of_one: of_one(p).square().sum())(params[name])
        assert second.abs().max() > 1e-6  # far above rounding
        torch.testing.assert_close(
            second, torch.autograd.functional.hessian(lambda p, of_one=of_one: of_one(p).square().sum(), params[name]))
    image = x[:1, :, :7, :9]
    torch.testing.assert_close(jacfwd(model)(image), torch.autograd.functional.jacobian(model, image))


@no_batching_rule
def test_forward_derivatives_are_finite_differences(tiny):
    model, params, x, logits = tiny
    tangents = {name: torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p) * .1 for name, p in params.items()}
    step = 1e-6
    value, slope = jvp(logits, (params, x), (tangents, torch.ones_like(x)))
    torch.testing.assert_close(value, model(x))
    ends = [logits({name: p + s * tangents[name] for name, p in params.items()}, x + s) for s in (step, -step)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@no_batching_rule
def test_ensembles(tiny):
    model, _, x, _ = tiny
    models = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for i, one in enumerate(models):
            for p in one.parameters():
                p.mul_(1 + .1 * i)
    state = stack_module_state(models)
    base = copy.deepcopy(model).to('meta')
    for context in (torch.no_grad(), contextlib.nullcontext()):
        with context:
            outputs = vmap(lambda *state: functional_call(base, state, (x,)))(*state)
            for output, one in zip(outputs, models, strict=True):
                torch.testing.assert_close(output, one(x))


# ---- tracers and walkers of modules


@pytest.mark.parametrize('kind', slow_but('map'))
def test_a_symbolic_trace_serves_every_size(kind):
    model = shallow(kind)
    traced = torch.fx.symbolic_trace(model)
    assert_same_at_every_size(traced, model)
    x = noise(2, 3, 40, 70)
    model.train()
    traced = torch.fx.symbolic_trace(model)
    grads = [torch.autograd.grad(net(x).sum(), [dict(net.named_parameters())[name] for name, _ in
                                                model.named_parameters()]) for net in (traced, model)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_features_by_torchvision():
    extraction = pytest.importorskip('torchvision.models.feature_extraction')
    model, x = small(), noise(2, 3, 70, 101)
    convolutions = [f'stem.convs.{i}' for i in range(4)]
    stages = [f'stages.{i}' for i in range(4)]
    last = [f'stages.{i}.blocks.{len(stage.blocks) - 1}.mlp.fc2' for i, stage in enumerate(model.stages)]
    for names in extraction.get_graph_node_names(model):
        assert {*convolutions, *last, 'norm', 'to_map.permute', 'head.fc'} <= set(names)
    found = extraction.create_feature_extractor(model, [*convolutions, *stages, 'norm', 'to_map', 'head.fc'])(x)
    final, maps = model.forward_intermediates(x)
    expected = [*(conv(F.pad(x, (0, 3, 0, 2))) for conv in model.stem.convs), *maps]
    for name, wanted in zip([*convolutions, *stages], expected, strict=True):
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found['to_map'], final)
    torch.testing.assert_close(found['norm'], final.permute(0, 2, 3, 1))
    torch.testing.assert_close(found['head.fc'], model(x))


@pytest.mark.parametrize('args', [{}, dict(num_classes=0), dict(stage_norm=False), dict(norm_layer='rmsnorm')], ids=str)
def test_children_in_a_row_are_the_network(args):
    model, x = small(**args), noise(1, 3, 70, 101)
    children = dict(model.named_children())
    features = model.forward_features(x)
    expected = dict(
        stem=model.stem(x), stages=model.forward_intermediates(x)[1][-1], to_tokens=None,
        norm=features.permute(0, 2, 3, 1), to_map=features, head=model(x))
    assert list(children) == list(expected)
    for i, (name, wanted) in enumerate(expected.items()):
        out = nn.Sequential(*list(children.values())[:i + 1])(x)
        if wanted is not None:
            torch.testing.assert_close(out, wanted, msg=name)


def test_every_module_takes_and_returns_a_tensor():
    model, seen = small(), set()
    for name, module in model.named_modules():
        def hook(module, args, out, name=name):
            assert len(args) == 1 and isinstance(args[0], torch.Tensor) and isinstance(out, torch.Tensor), name
            seen.add(name)
        module.register_forward_hook(hook)
    model(noise(1, 3, 70, 101))
    unseen = {name for name, _ in model.named_modules()} - seen
    assert {name.rpartition('.')[2] for name in unseen} <= {'convs', 'attn_drop'}  # a list; without a rate


@pytest.mark.parametrize('kind', ['forward', 'pre', 'backward', 'global', 'method'])
def test_whoever_watches_a_convolution_gets_its_calls(kind):
    model, calls = small().train(), []
    conv = model.stem.convs[0]

    def hook(*args):
        calls.append(args[0])

    if kind == 'method':
        forward = conv.forward
        conv.forward = lambda x: (hook(conv), forward(x))[1]
        handle = contextlib.nullcontext()
    else:
        handle = {
            'forward': conv.register_forward_hook, 'pre': conv.register_forward_pre_hook,
            'backward': conv.register_full_backward_hook,
            'global': nn.modules.module.register_module_forward_hook}[kind](hook)
    with handle:
        model(noise(1, 3, 64, 64).requires_grad_()).sum().backward()
    assert conv in calls


# ---- traces


@pytest.mark.filterwarnings('ignore:.torch.jit.trace', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('kind', slow_but('fit_groups'))
@pytest.mark.parametrize('size', [(96, 130), pytest.param((20, 20), marks=pytest.mark.slow)], ids=str)
def test_one_trace_serves_every_size(kind, size):
    model = shallow(kind)
    with torch.no_grad():
        traced = torch.jit.trace(model, noise(1, 3, *size), check_trace=False)
    assert_same_at_every_size(traced, model)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # of tracing
@pytest.mark.parametrize('kind', KINDS)
def test_openvino_converts_the_model_itself(kind):
    openvino = pytest.importorskip('openvino')
    model = shallow(kind)
    converted = openvino.convert_model(model, example_input=noise(2, 3, 230, 310), input=[-1, 3, -1, -1])
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    assert_same_at_every_size(lambda x: compiled(x.numpy())[0], model)


# ---- whoever changes what a module does, or watches operators: wide maps as small ones, with gradients and without

WIDE, NARROW = (1, 3, 416, 416), (1, 3, 70, 101)
CALLS = {  # a patch of a class, or of one module; each doubles what comes out
    'block class': lambda model, patch: patch(type(model.stages[0].blocks[0]), 'forward'),
    'attention class': lambda model, patch: patch(type(model.stages[0].blocks[0].attn), 'forward'),
    'linear class': lambda model, patch: patch(nn.Linear, 'forward'),
    'convolution class': lambda model, patch: patch(nn.Conv2d, 'forward'),
    'convolution class, inside': lambda model, patch: patch(nn.Conv2d, '_conv_forward'),
    'convolution, inside': lambda model, patch: patch(model.stem.convs[0], '_conv_forward'),
    'norm class': lambda model, patch: patch(nn.LayerNorm, 'forward'),
    'call of any module': lambda model, patch: patch(nn.Module, '__call__'),
    'mlp': lambda model, patch: patch(model.stages[1].blocks[0].mlp, 'forward'),
}


@pytest.mark.parametrize('shape', [NARROW, WIDE], ids=['narrow', 'wide'])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('call', CALLS)
def test_a_patch_gets_every_call(call, grad, shape, monkeypatch):
    model = small()
    counts = dict.fromkeys(CALLS, 0)
    expected = {'block class': 10, 'attention class': 10, 'linear class': 10 * 8 + 1, 'convolution class': 10,
                'convolution class, inside': 10, 'convolution, inside': 1, 'norm class': 10 * 5 + 5, 'mlp': 1,
                'call of any module': sum(1 for name, module in model.named_modules()
                                          if not isinstance(module, nn.ModuleList) and 'attn_drop' not in name)}

    def patch(owner, name):
        old = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[call] += 1
            return old(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    CALLS[call](model, patch)
    with torch.set_grad_enabled(grad):
        model(noise(*shape))
    assert counts[call] == expected[call]


REPLACED = {
    'drop_path1': nn.LayerNorm(32, elementwise_affine=False), 'drop_path2': nn.Linear(32, 32), 'attn': nn.Identity(),
    'attn.qkv': nn.Linear(32, 96, bias=False), 'mlp': nn.Linear(32, 32), 'norm1': nn.Identity(),
    'cooling': nn.Linear(32, 32), 'attn.proj_drop': nn.LayerNorm(32, elementwise_affine=False),
}


@pytest.mark.parametrize('place', REPLACED)
def test_a_module_in_the_place_of_another_acts_on_wide_maps(place):
    model, x, seen = small(), noise(*WIDE), []
    model.stages[0].blocks[1].set_submodule(place, REPLACED[place])
    block = model.stages[0].blocks[1]
    with torch.no_grad():
        tokens = model.stages[0].blocks[0](model.stem(x).permute(0, 2, 3, 1))
        y = tokens + block.drop_path1(block.attn(block.norm1(tokens)))
        y = block.cooling(y + block.drop_path2(block.mlp(block.norm2(y))))
        model.stages[0].register_forward_hook(lambda module, args, out: seen.append(out))
        model(x)
    torch.testing.assert_close(seen[0].permute(0, 2, 3, 1), y)


class Watching(TorchDispatchMode):
    """Keeps every result, with a copy of what it was."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func.overloadpacket.__name__ in ('mm', 'bmm', 'addmm', 'mul', 'add'):
            self.kept.append((out, out.clone()))
        return out


class WatchingFunctions(TorchFunctionMode):
    """As `Watching` does, at the level of functions."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and getattr(func, '__name__', '') in (
                'matmul', '__matmul__', 'linear', 'mul', 'add', '__add__', 'softmax', 'scaled_dot_product_attention'):
            self.kept.append((out, out.detach().clone()))
        return out


@pytest.mark.parametrize('mode', [Watching, WatchingFunctions])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('threads', [1, 2])
def test_nothing_is_written_over_what_a_mode_keeps(mode, grad, threads):
    torch.set_num_threads(threads)
    model, x = small(), noise(*NARROW)
    expected = model(x)
    with mode() as watching, torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), expected)
        if grad:
            model(x).sum().backward()
    assert len(watching.kept) > 50
    for out, copied in watching.kept:
        assert torch.equal(out, copied)


@pytest.mark.parametrize('saved', [
    ('mm', 'bmm', 'addmm'), ('grouped_attention',), ('mm', 'native_layer_norm', 'gelu', '_softmax', 'mul')], ids=str)
@pytest.mark.parametrize('threads', [1, 2])
def test_selective_checkpointing_is_exact(saved, threads):
    torch.set_num_threads(threads)
    model, x = small().train(), noise(2, 3, 70, 101)
    grads = []
    for selective in (False, True):
        def policy(ctx, op, *args, **kwargs):
            keep = op.overloadpacket.__name__ in saved if hasattr(op, 'overloadpacket') else False
            return checkpoint.CheckpointPolicy.MUST_SAVE if keep else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

        model.zero_grad()
        out = checkpoint.checkpoint(
            model, x, use_reentrant=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(policy)) if selective else model(x)
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', [NARROW, WIDE], ids=['narrow', 'wide'])
def test_a_default_device_changes_nothing(shape):
    model, x = small(), noise(*shape)
    with torch.no_grad():
        expected = model(x)
        with torch.device('meta'):
            torch.testing.assert_close(model(x), expected)


@no_batching_rule
@pytest.mark.parametrize('shape', [NARROW, WIDE], ids=['narrow', 'wide'])
def test_forward_derivatives_under_no_grad(shape):
    model, x = small(), noise(*shape)
    with torch.no_grad(), forward_ad.dual_level():
        value, slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
    ahead, behind = (model(x + step) for step in (1e-2, -1e-2))
    torch.testing.assert_close(value, model(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-2, rtol=.05, atol=.05 * slope.abs().max().item())


class Adapter(nn.Module):
    """A linear layer with an update of its weight, as adapters make them: any dtype but that of its weight is wrong."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.update = layer, nn.Parameter(torch.zeros_like(layer.weight))

    def forward(self, x):
        assert x.dtype == self.layer.weight.dtype
        return F.linear(x, self.layer.weight + self.update, self.layer.bias)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_adapters_on_the_position_mlp_get_its_precision(dtype):
    model, x = small().to(dtype), noise(*NARROW).to(dtype)
    expected = model(x)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and 'pos_bias' in name:
            model.set_submodule(name, Adapter(layer))
    torch.testing.assert_close(model(x), expected)
