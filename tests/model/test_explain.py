"""Attention weights, by timm's tools and by our own, against a loop from the definition."""
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from types import MethodType

import pytest
import timm
import torch
from common import GROUPINGS, lively, noise, slow_attention, small
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch import nn

from timm_crossformer.explain import attention_from, token_at
from timm_crossformer.model import CrossFormerStage
from timm_crossformer.ops.grouping import map_layout

SMALL = {
    'crossformer_tiny': dict(embed_dim=32, depths=(1, 1, 3, 2), num_heads=(1, 2, 4, 8), group_size=4),
    'crossformer_pp_small': dict(
        embed_dim=32, depths=(2, 2, 3, 1), num_heads=(1, 2, 4, 8), group_size=(4, 3, (2, 4), 2)),
    'crossformer_lucidrains': dict(
        embed_dim=(32, 48, 64, 64), depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 2), group_size=4),
}
SIZES = [(65, 100), (33, 41)]  # maps of 17 x 25 and 9 x 11 tokens and so on: padded in all stages, or whole groups


@pytest.fixture(params=[True, False], ids=['fused', 'explicit'])
def fused(request):
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(True)


@pytest.fixture
def explicit():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def build(name, **kwargs):
    return lively(timm.create_model(name, num_classes=3, **{**SMALL[name], **kwargs}))


def attentions(model):
    return [block.attn for stage in model.stages for block in stage.blocks]


@torch.no_grad()
def inputs_of(model, image):
    """Return the map [1, H, W, C] that each attention gets for an image."""
    seen = []
    handles = [attn.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for attn in attentions(model)]
    model(image)
    for handle in handles:
        handle.remove()
    return seen


def spread(weights, attn, height, width):
    """Turn weights [groups, heads, N, N] of one image into [heads, H * W, H * W], by the definition of a layout."""
    rows, cols = map_layout(height, width, attn.group_size, attn.interval, attn.grouping)

    def place(n, layout):
        _, size, interval = layout
        return [(t // (size * interval) * interval + t % interval, t % (size * interval) // interval) for t in range(n)]

    groups, members = [], []
    for row_group, row in place(height, rows):
        for col_group, col in place(width, cols):
            groups.append(row_group * cols[0] * cols[2] + col_group)
            members.append(row * cols[1] + col)
    groups, members = torch.tensor(groups), torch.tensor(members)
    dense = weights[groups][:, :, :, members].gather(2, members[:, None, None, None].expand(
        -1, weights.shape[1], 1, len(members)))[:, :, 0]  # H * W, heads, H * W
    return (dense * (groups[:, None] == groups)[:, None]).transpose(0, 1)


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_timm_extracts_the_weights_of_every_block(explicit, name, grouping, size):
    model = build(name, lda_grouping=grouping)
    images = noise(2, 3, *size)
    second = inputs_of(model, images[1:])
    expected = [slow_attention(attn, x) for attn, x in zip(attentions(model), second, strict=True)]
    for method in ('hook', 'fx') if size == SIZES[0] else ('hook',):
        found = AttentionExtract(model, method=method)(images)
        assert len(found) == sum(model.depths)
        for attn, x, wanted, weights in zip(attentions(model), second, expected, found.values(), strict=True):
            assert weights.shape[1] == attn.num_heads and weights.shape[2] == weights.shape[3]
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            dense = spread(weights.unflatten(0, [2, -1])[1], attn, *x.shape[1:3])
            torch.testing.assert_close(dense, wanted, rtol=1e-3, atol=1e-5)


def test_extraction_in_training_keeps_to_the_weights(explicit):
    model = small()
    found = AttentionExtract(model, mode='train', method='hook')(noise(2, 3, 64, 64))
    assert len(found) == sum(model.depths) and all(map_.requires_grad for map_ in found.values())


def test_the_environment_switches_fused_attention_off():
    script = """
import timm, torch
from timm.utils import AttentionExtract
import timm_crossformer
for method in ('hook', 'fx'):
    model = timm.create_model('test_crossformer')
    print(len(AttentionExtract(model, method=method)(torch.randn(1, 3, 64, 64))))
"""
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=True,
        env={**os.environ, 'TIMM_FUSED_ATTN': '0'})
    assert done.stdout.split() == ['10', '10']


@pytest.mark.parametrize('flag', [False, True], ids=['off', 'on'])
def test_the_switch_is_for_models_to_come_as_in_timm(flag):
    names = 'test_crossformer', 'swin_tiny_patch4_window7_224', 'test_vit'
    set_fused_attn(not flag, experimental=not flag)
    try:
        before = [timm.create_model(name) for name in names]
        set_fused_attn(flag, experimental=flag)
        after = [timm.create_model(name) for name in names]
    finally:
        set_fused_attn(True)
    ours, *others = [[{m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn')} for model in pair]
                     for pair in zip(before, after, strict=True)]
    assert ours == [{not flag}, {flag}] and others == [ours, ours]


@torch.no_grad()
def test_dropout_of_weights_switched_on_alone_acts(fused):
    model = small(attn_drop_rate=.5, proj_drop_rate=.5, drop_path_rate=.5)
    x = noise(2, 3, 72, 96)
    plain = model(x)
    for attn in attentions(model):
        attn.attn_drop.train()

    def sample(seed):
        torch.manual_seed(seed)
        return model(x)

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    for attn in attentions(model):
        attn.attn_drop.eval()
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_what_dropout_leaves_of_the_weights_is_scaled(explicit):
    model = small(attn_drop_rate=.25)
    x = noise(1, 3, 64, 64)
    kept = AttentionExtract(model, method='hook')(x)['stages.0.blocks.0.attn.attn_drop']
    model.stages[0].blocks[0].attn.attn_drop.train()
    some = {}
    handle = model.stages[0].blocks[0].attn.attn_drop.register_forward_hook(lambda m, args, out: some.update(out=out))
    model(x)
    handle.remove()
    left = some['out'] != 0
    torch.testing.assert_close(some['out'][left], kept[left] / .75)
    assert left.float().mean().item() == pytest.approx(.75, abs=.05)


POINTS = [(0, 0), (1, 1), (.4, .6), (.999, .01)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_attention_from_a_point_is_a_row_of_the_loop(fused, name, grouping, size):
    model = build(name, lda_grouping=grouping)
    image = noise(1, 3, *size)
    expected = [slow_attention(attn, x).unflatten(-1, x.shape[1:3])
                for attn, x in zip(attentions(model), inputs_of(model, image), strict=True)]
    for at in POINTS:
        maps = attention_from(model, image, at)
        assert [len(blocks) for blocks in maps] == list(model.depths)
        rows = iter(expected)
        for stage, blocks in enumerate(maps):
            pixel = min(int(at[1] * size[0]), size[0] - 1), min(int(at[0] * size[1]), size[1] - 1)
            row, col = pixel[0] // (4 * 2 ** stage), pixel[1] // (4 * 2 ** stage)
            assert token_at(at, *size, stage) == (row, col)
            for weights in blocks:
                wanted = next(rows)
                torch.testing.assert_close(
                    weights, wanted[:, row * wanted.shape[3] + col], rtol=1e-3, atol=1e-5)
                assert torch.equal(weights == 0, wanted[:, row * wanted.shape[3] + col] == 0)
                torch.testing.assert_close(weights.sum((1, 2)), torch.ones(len(weights)))


def test_neighbours_attend_in_a_window_and_far_ones_on_a_lattice():
    maps = attention_from(small(lda_grouping='region'), noise(1, 3, 128, 192), (.5, .5))  # G = 4, I = 4: token (16, 24)
    short, long = (weights[0].nonzero().tolist() for weights in maps[0])
    assert short == [[row, col] for row in range(16, 20) for col in range(24, 28)]
    assert long == [[row, col] for row in range(16, 32, 4) for col in range(16, 32, 4)]


@pytest.mark.parametrize('kwargs', [
    {}, {'fit_groups': True}, {'group_size': ((3, 5),) * 4}, {'group_size': (4, 3, [2, 3, 4, 5], 2)},
    {'stage_norm': False}, {'head_dim': 8}], ids=str)
def test_weights_times_values_are_what_the_block_returns(kwargs):
    model = small(**kwargs)
    image = noise(1, 3, 72, 104)
    maps = attention_from(model, image, (.3, .8))
    weights = [w for blocks in maps for w in blocks]
    stages = [stage for stage, depth in enumerate(model.depths) for _ in range(depth)]
    with torch.no_grad():
        for stage, attn, x, w in zip(stages, attentions(model), inputs_of(model, image), weights, strict=True):
            row, col = token_at((.3, .8), 72, 104, stage)
            v = attn.qkv(x)[0].unflatten(-1, [3, attn.num_heads, -1])[:, :, 2]  # H, W, heads, head_dim
            out = attn.proj(torch.einsum('hyx,yxhd->hd', w, v).flatten())
            torch.testing.assert_close(out, attn(x)[0, row, col], rtol=1e-3, atol=1e-4)


def pyramid(**kwargs):
    return lively(timm.create_model('test_crossformer', features_only=True, **kwargs))  # with the weights of `small`


@pytest.mark.parametrize('wrap', [
    lambda: small(num_classes=0), pyramid, lambda: pyramid(out_indices=(0, 2)), lambda: pyramid(feature_cls='getter'),
    lambda: nn.Sequential(small(), nn.Softmax(1)), lambda: small().train(), lambda: small().double(),
], ids=['headless', 'pyramid', 'some-levels', 'getter', 'wrapped', 'training', 'double'])
def test_any_form_of_the_model_gives_the_same(wrap):
    model = wrap()
    dtype = next(model.parameters()).dtype
    image = noise(1, 3, 65, 100)
    maps = attention_from(model, image.to(dtype), (.4, .6))
    assert len(maps) == sum(isinstance(m, CrossFormerStage) for m in model.modules()) and all(maps)
    for ours, expected in zip(maps, attention_from(small(), image, (.4, .6)), strict=False):
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_weights_in_fp32(dtype):
    image = noise(1, 3, 65, 100)
    expected = attention_from(small(), image, (.4, .6))
    with torch.autocast('cpu', dtype):
        cast = attention_from(small(), image, (.4, .6))
    for maps in (cast, attention_from(small().to(dtype), image.to(dtype), (.4, .6))):
        for a, b in zip(chain(*maps), chain(*expected), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.sum((1, 2)), torch.ones(len(a)))
            assert (a - b).abs().mean() < .1 * b.mean() and torch.equal(a == 0, b == 0)


def state_of(model):
    """Everything a caller could see: flags, hooks, attributes, weights."""
    return [(
        name, m.training, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(m.__dict__),
        [(n, p.data_ptr(), p._version, p.requires_grad, p.grad) for n, p in m._parameters.items() if p is not None],
    ) for name, m in model.named_modules()]


@pytest.mark.parametrize('fails', [False, True], ids=['runs', 'fails'])
def test_the_model_stays_as_it_was(fails):
    model = small(attn_drop_rate=.5, drop_path_rate=.5).train()
    model.stages[1].eval()
    calls = []
    model.stages[0].blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    if fails:
        model.stages[2].blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before, random = state_of(model), torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            attention_from(model, noise(1, 3, 64, 64), (0, 0))
    else:
        attention_from(model, noise(1, 3, 64, 64), (0, 0))
    assert state_of(model) == before and torch.equal(random, torch.get_rng_state())
    assert calls == [1] and torch.is_grad_enabled()


def test_a_compiled_model_stays_compiled():
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    tiny = dict(embed_dim=(32, 48), depths=(2, 1), num_heads=(1, 2), interval=(4, 2))
    model = torch.compile(small(**tiny), backend=backend)
    image = noise(1, 3, 64, 64)
    with torch.no_grad():
        out = model(image)
        compiled = len(frames)
        maps = attention_from(model, image, (.5, .5))
        for a, b in zip(chain(*maps), chain(*attention_from(small(**tiny), image, (.5, .5))), strict=True):
            assert torch.equal(a, b)
        assert compiled
        assert torch.equal(model(image), out) and len(frames) == compiled


def same(maps, expected):
    for ours, wanted in zip(chain(*maps), chain(*expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def compiles():
    """Say whether torch.compile does anything in this process."""
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(3))
    return bool(frames)


class Pausing:
    """Threads that run `attention_from` and wait in the middle of the network, until they are told to go on."""

    def __init__(self, *models):
        self.reached, self.resume, self.pool = {}, {}, ThreadPoolExecutor(2)
        for model in models:
            model.stages[1].register_forward_pre_hook(self.wait)

    def wait(self, *_):
        me = threading.get_ident()
        if me in self.resume:
            self.reached[me].set()
            assert self.resume[me].wait(60)

    def start(self, model, image, at):
        """Return a future, once the middle is reached, and what lets it go on."""
        reached, resume = threading.Event(), threading.Event()

        def run():
            me = threading.get_ident()
            self.reached[me], self.resume[me] = reached, resume
            try:
                return attention_from(model, image, at)
            finally:
                reached.set()
                del self.resume[me]

        future = self.pool.submit(run)
        assert reached.wait(60)
        return future, resume


def infer(model, image):
    with torch.no_grad():
        return [model(image)]


def step(model, image):
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(image).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_another_thread_sees_nothing(train):
    model, image = small(attn_drop_rate=.5, proj_drop_rate=.5, drop_path_rate=.5).train(train), noise(1, 3, 65, 100)
    threads = Pausing(model)
    before, work = state_of(model), step if train else infer
    expected, alone = attention_from(small(), image, (.4, .6)), work(model, image)
    model.zero_grad()
    future, resume = threads.start(model, image, (.4, .6))
    assert state_of(model) == before and compiles()
    beside = work(model, image)
    resume.set()
    same(future.result(), expected)
    assert all(torch.equal(a, b) for a, b in zip(beside, alone, strict=True))


@pytest.mark.parametrize('other', ['same', 'other'])
def test_two_threads_look_at_once(other):
    first = small(drop_path_rate=.5).train()
    second = first if other == 'same' else small(lda_grouping='grid', drop_path_rate=.5).train()
    image = noise(1, 3, 65, 100)
    wanted = [attention_from(model.eval(), image, at) for model, at in ((first, (.4, .6)), (second, (1, 0)))]
    first.train(), second.train()
    threads = Pausing(*{first, second})
    before = state_of(first), state_of(second)
    a, resume_a = threads.start(first, image, (.4, .6))
    b, resume_b = threads.start(second, image, (1, 0))
    resume_a.set()  # out in the order they came in
    same(a.result(), wanted[0])
    resume_b.set()
    same(b.result(), wanted[1])
    assert (state_of(first), state_of(second)) == before and compiles()


class Levels(nn.Module):
    """Runs modules that stand in a list as well."""

    def __init__(self, net):
        super().__init__()
        self.first, self.net = nn.Dropout(.5), net
        self.steps = [[self.first], [net.stem, *net.stages]]

    def forward(self, x):
        for module in chain(*self.steps):
            x = module(x)
        return x


def no_backend(graph, inputs):
    raise AssertionError('nothing should be compiled here')


def patched(patch):
    def build():
        net = small(proj_drop_rate=.5)
        for module in (net.stages[0].blocks[0].mlp, net.stages[1].blocks[1].attn):
            patch(module)
        return net
    return build


def by_closure(module):
    old = module.forward
    module.forward = lambda x: old(x)


def by_default(module):
    module.forward = lambda x, *, old=module.forward: old(x)


def by_partial(module):
    module.forward = partial(type(module).forward, module)


def by_method(module):
    module.forward = MethodType(lambda self, x: type(self).forward(self, x), module)


def by_compiled_forward(module):
    module.forward = torch.compile(module.forward, backend=no_backend)


def by_compiling(module):
    module.compile(backend=no_backend)


@pytest.mark.filterwarnings('ignore:.torch.jit.')
@pytest.mark.parametrize('build', [
    *map(patched, [by_method, by_compiled_forward, by_compiling]),
    lambda: nn.Sequential(nn.BatchNorm2d(3, eps=0.), small()),
    lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3, eps=0.), nn.Dropout(.5))), small()),
    lambda: nn.Sequential(torch.compile(small(drop_path_rate=.5), backend=no_backend)),
], ids=['method', 'compiled-forward', 'compiled-module', 'batch-norm', 'scripted', 'compiled-inside'])
def test_what_stands_around_and_inside_runs_as_in_evaluation(build):
    model, image = build().train(), noise(1, 3, 65, 100)
    before = state_of(model), [b.clone() for b in model.buffers()], getattr(model, 'level', None)
    same(attention_from(model, image, (.4, .6)), attention_from(small(), image, (.4, .6)))
    assert state_of(model) == before[0] and getattr(model, 'level', None) is before[2]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before[1], strict=True))


@pytest.mark.parametrize('build', [
    *map(patched, [by_closure, by_default, by_partial]), lambda: Levels(small())],
    ids=['closure', 'default', 'partial', 'list'])
def test_what_would_call_the_model_itself_is_refused(build):
    model, image = build().train(), noise(1, 3, 65, 100)
    before = state_of(model)
    with pytest.raises(ValueError, match=r'Call `eval\(\)` first|every block once'):
        attention_from(model, image, (.4, .6))
    assert state_of(model) == before


class Running(nn.Module):
    """Runs some networks, each as often as it is named."""

    def __init__(self, nets, order, change=lambda x: x):
        super().__init__()
        self.nets, self.order, self.change = nn.ModuleList(nets), order, change

    def forward(self, x):
        return [self.nets[i](self.change(x)) for i in self.order]


def without(part, forward):
    model = small()
    model.get_submodule(part).forward = forward
    return model


def with_identity(part):
    model = small()
    model.set_submodule(part, nn.Identity())
    return model


@pytest.mark.filterwarnings('ignore:.torch.jit.trace', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('at, image, model, match', [
    ((1.1, 0), (1, 3, 64, 64), small, r'`at` needs two numbers from 0 to 1, got \(1\.1, 0\)\. Pass x / width'),
    ((0, -.1), (1, 3, 64, 64), small, r'got \(0, -0\.1\)'),
    ((math.nan, 0), (1, 3, 64, 64), small, r'got \(nan, 0\)'),
    ((.5,), (1, 3, 64, 64), small, r'got \(0\.5,\)'),
    ((.5, .5), (2, 3, 64, 64), small, r'`image` needs shape .* got \[2, 3, 64, 64\]\. Pass images one by one'),
    ((.5, .5), (3, 64, 64), small, r'got \[3, 64, 64\]'),
    ((.5, .5), (1, 3, 64, 64), lambda: timm.create_model('test_vit'), r'CrossFormer.*got VisionTransformer\. Create'),
    ((.5, .5), (1, 3, 64, 64), lambda: torch.jit.trace(small(), noise(1, 3, 64, 64)), r'got TopLevelTracedModule'),
    ((.5, .5), (1, 3, 64, 64), lambda: nn.Sequential(nn.Upsample(scale_factor=2), small()),
     r'stage 0 should have a map of \(16, 16\) tokens, got \(32, 32\)\. Pass the CrossFormer inside'),
    ((.5, .5), (1, 3, 64, 64), lambda: Running([small()], [0], lambda x: torch.cat([x, x.flip(-1)])),
     r'stage 0 should have a map of \(16, 16\) tokens, got 2 of \(16, 16\)\. Pass the CrossFormer inside'),
    ((.5, .5), (1, 3, 64, 64), lambda: Running([small()], [0, 0]),
     r'run every block once, got 2 runs of nets\.0\.stages\.0\.blocks\.0\.attn\. Pass the CrossFormer inside'),
    ((.5, .5), (1, 3, 64, 64), lambda: Running([small()], []), r'got 0 runs of nets\.0\.stages\.0\.blocks\.0\.attn\.'),
    ((.5, .5), (1, 3, 64, 64), lambda: Running([small(), small()], [0]),
     'one CrossFormer, got 2 in Running. Pass the one'),
    ((.5, .5), (1, 3, 4, 4), lambda: Running([small(), small()], [0, 1]), 'got 2 in Running'),  # maps of the right size
    ((.5, .5), (1, 3, 64, 64), lambda: small().stages[1:], 'got 0 in Sequential'),
    ((.5, .5), (1, 3, 64, 64), lambda: without('stages.1.blocks.0', lambda x: x),
     r'got 0 runs of stages\.1\.blocks\.0\.attn\.'),
    ((.5, .5), (1, 3, 64, 64), lambda: without('stages.1.blocks.0.attn', lambda x: x),
     r'`qkv` and its `pos_bias`, got \[\] of stages\.1\.blocks\.0\.attn\. Pass it before'),
    ((.5, .5), (1, 3, 64, 64), lambda: with_identity('stages.1.blocks.0'), r'got 0 in stages\.1\.blocks\.0\. Pass it'),
    ((.5, .5), (1, 3, 64, 64), lambda: with_identity('stages.1.blocks.0.attn'), r'got 0 in stages\.1\.blocks\.0\.'),
], ids=['right', 'above', 'nan', 'one', 'batch', 'no-batch', 'vit', 'traced', 'scaled', 'repeated', 'twice', 'never',
        'two-one-runs', 'two-of-small-images', 'no-first-stage', 'block-skipped', 'attention-skipped', 'block-replaced',
        'attention-replaced'])
def test_errors_say_rule_value_and_remedy(at, image, model, match):
    model = model()
    flags = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        attention_from(model, noise(*image), at)
    assert flags == [m.training for m in model.modules()]
