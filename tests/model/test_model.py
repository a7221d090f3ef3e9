"""Any size, any order, any batch, any precision; arguments and inputs that are wrong."""
import itertools
import json

import numpy as np
import pytest
import timm
import torch
from common import GROUPINGS, VARIANTS, noise, small
from timm.layers import set_fused_attn

from timm_crossformer import CrossFormer
from timm_crossformer.config import plain_group_size
from timm_crossformer.layers import GroupAttention
from timm_crossformer.layers.position_bias import group_offsets
from timm_crossformer.ops import cpu

SIZES = [(1, 1), (2, 3), (7, 500), (33, 97), (64, 64), (100, 36), (129, 130), (230, 310)]


def ceil_div(a, b):
    return -(-a // b)


@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_any_size_gives_maps_of_ceil_size(size, grouping):
    model = small(lda_grouping=grouping)
    final, maps = model.forward_intermediates(noise(2, 3, *size))
    for i, m in enumerate(maps):
        assert m.shape == (2, model.feature_info[i]['num_chs'], *(ceil_div(s, 4 * 2 ** i) for s in size))
        assert m.isfinite().all()
    assert model.forward_head(final).shape == (2, 10)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.slow
def test_every_variant_takes_odd_sizes(variant):
    model = timm.create_model(variant).eval()
    with torch.inference_mode():
        for size in ((1, 1), (33, 97), (230, 310)):
            assert model(noise(1, 3, *size)).isfinite().all()


def test_the_result_does_not_depend_on_earlier_calls_or_order():
    images = [noise(1, 3, h, w, seed=h) for h, w in SIZES]
    model = small()
    with torch.inference_mode():
        alone = [small()(x) for x in images]
        for order in ([3, 1, 4, 0, 5, 2, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0, 0, 7]):
            for i in order:
                assert torch.equal(model(images[i]), alone[i])


@pytest.mark.parametrize('grouping', GROUPINGS)
def test_the_result_does_not_depend_on_the_batch(grouping):
    model, x = small(lda_grouping=grouping), noise(5, 3, 75, 90)
    with torch.inference_mode():
        together = model(x)
        for i in range(5):
            torch.testing.assert_close(model(x[i:i + 1]), together[i:i + 1], rtol=1e-5, atol=1e-5)


def test_padding_of_the_image_is_zeros_at_the_bottom_and_right():
    model, x = small(), noise(1, 3, 61, 90)
    torch.testing.assert_close(model(x), model(torch.nn.functional.pad(x, (0, 2, 0, 3))))


def slow_attention(attn, x):
    """Attend group by group and pair by pair of tokens, by true offsets."""
    B, H, W, _ = x.shape
    heads, dim = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).unflatten(-1, (3, heads, dim)).unbind(-3)  # B, H, W, heads, dim
    out = torch.empty(B, H, W, heads, dim)
    whole = attn.group_size[0] >= H or attn.group_size[1] >= W
    step = 1 if whole or attn.grouping == 'sda' else attn.interval
    for qy, qx in itertools.product(range(H), range(W)):
        scores, values = [], []
        for ky, kx in itertools.product(range(H), range(W)):
            if whole:
                same = True
            elif attn.grouping == 'sda':
                same = (qy // attn.group_size[0], qx // attn.group_size[1]) == (
                    ky // attn.group_size[0], kx // attn.group_size[1])
            else:
                same = (qy - ky) % step == 0 and (qx - kx) % step == 0
                if attn.grouping == 'region':
                    span = [g * step for g in attn.group_size]
                    same = same and (qy // span[0], qx // span[1]) == (ky // span[0], kx // span[1])
            if same:
                offset = torch.tensor([(qy - ky) / step, (qx - kx) / step])
                scores.append((q[:, qy, qx] * k[:, ky, kx]).sum(-1) * dim ** -0.5 + attn.pos_bias.mlp(offset))
                values.append(v[:, ky, kx])
        weight = torch.stack(scores).softmax(0)
        out[:, qy, qx] = (weight[..., None] * torch.stack(values)).sum(0)
    return attn.proj(out.flatten(-2))


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
@pytest.mark.parametrize('grouping', ['sda', 'map', 'region'])
@pytest.mark.parametrize('size', [(8, 8), (3, 9), (7, 10), (9, 5)], ids=str)
def test_attention_matches_the_slow_oracle(size, grouping, fused):
    set_fused_attn(fused)
    try:
        attn = GroupAttention(32, 2).eval()
    finally:
        set_fused_attn(True)
    attn.set_groups((4, 4) if size != (7, 10) else (3, 4), 2, grouping)
    for i, p in enumerate(attn.parameters()):
        p.data.copy_(noise(*p.shape, seed=i) * (p.shape[-1] ** -0.5))
    x = noise(2, *size, 32)
    torch.testing.assert_close(attn(x), slow_attention(attn, x), rtol=1e-4, atol=1e-5)


def test_large_position_biases_are_used_in_bands_without_a_difference():
    attn = GroupAttention(64, 2).eval().requires_grad_(False)
    attn.set_groups((7, 7), 1, 'map')
    x = noise(1, 64, 64, 64) * 3
    assert 4 * cpu._TILE < 64 ** 4  # several tiles
    q, k, v = attn.qkv(x).view(1, 4096, 3, 2, 32).permute(2, 0, 3, 1, 4)
    y, c = torch.arange(4096) // 64, torch.arange(4096) % 64
    table = attn.pos_bias(group_offsets(64, 64, None, x.device))
    some = torch.tensor([0, 1, 63, 64, 2000, 2047, 2048, 4095])
    bias = table[:, y[some, None] - y + 63, c[some, None] - c + 63]
    weight = ((q[0][:, some] * 32 ** -0.5) @ k[0].transpose(1, 2) + bias).softmax(-1)
    expected = attn.proj((weight @ v[0]).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attn(x).flatten(1, 2)[0, some], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
def test_outputs_and_gradients_are_finite_in_every_precision(fused, grouping, dtype):
    set_fused_attn(fused)
    try:
        model = small(lda_grouping=grouping).to(dtype).train()
    finally:
        set_fused_attn(True)
    for size in ((33, 97), (72, 40)):
        x = (3 * noise(2, 3, *size)).to(dtype).requires_grad_()
        y = model(x)
        y.float().pow(2).sum().backward()
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_are_those_of_finite_differences():
    attn = GroupAttention(16, 1).double()
    attn.set_groups((3, 2), 2, 'region')
    x = noise(1, 8, 7, 16).double().requires_grad_()  # full regions, and remainders with two kinds of phases
    assert torch.autograd.gradcheck(lambda x: attn(x)[..., :2], (x,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(('args', 'message'), [
    (dict(num_heads=(1, 2, 2)), '`num_heads` needs one entry per stage, got len(depths)=4, len(num_heads)=3'),
    (dict(interval=(1, 2)), '`interval` needs one entry per stage, got len(depths)=4, len(interval)=2'),
    (dict(embed_dim=(32, 64)), '`embed_dim` needs one entry per stage'),
    (dict(mlp_ratio=(4, 4)), '`mlp_ratio` needs one entry per stage'),
    (dict(num_heads=5), 'got 5 heads for 32 channels in stage 0'),
    (dict(num_heads=0), '`num_heads` needs whole numbers from 1 up, got 0'),
    (dict(num_heads=2.5), '`num_heads` needs whole numbers from 1 up, got 2.5'),
    (dict(embed_dim=32.), '`embed_dim` needs whole numbers from 16 up, got 32.0'),
    (dict(mlp_ratio='4'), "`mlp_ratio` needs to be above 0, got '4'"),
    (dict(global_pool='foo'), "`global_pool` is one of 'avg', 'max', "),
    (dict(depths=()), 'at least one block per stage, got ()'),
    (dict(depths=2), 'needs a sequence with at least one block per stage, got 2'),
    (dict(head_dim=0), '`head_dim` needs whole numbers from 1 up, got 0'),
    (dict(head_dim=16.), '`head_dim` needs whole numbers from 1 up, got 16.0'),
    (dict(head_dim='a'), "`head_dim` needs whole numbers from 1 up, got 'a'"),
    (dict(depths=(1, 1., 1, 1)), '`depths` needs whole numbers from 1 up, got 1.0'),
    (dict(drop_path_rate=1.), '`drop_path_rate` needs to be at least 0 and below 1, got 1.0'),
    (dict(interval=1.5), '`interval` needs whole numbers from 1 up, got 1.5'),
    (dict(depths=(1, 0, 1, 1)), '`depths` needs whole numbers from 1 up, got 0'),
    (dict(embed_dim=8, num_heads=1), '`embed_dim` needs whole numbers from 16 up, got 8'),
    (dict(group_size=0), '`group_size` needs whole numbers from 1 up, got 0'),
    (dict(group_size=(7, 7, 7)), '`group_size` needs one entry per stage'),
    (dict(group_size=(7, 7, [7, 7, 7], 7)), 'got [7, 7, 7] for stage 2 with 4 blocks'),
    (dict(group_size=(7, 7, 7, 2.5)), '`group_size` needs whole numbers'),
    (dict(group_size=[[4, 8]] * 4), '`group_size`: two numbers in a list are one per block in a stage of two blocks'),
    (dict(lda_group_size=(0, 1, 1, 1)), '`lda_group_size` needs whole numbers'),
    (dict(interval=0), '`interval` needs whole numbers from 1 up, got 0'),
    (dict(lda_grouping='window'), "`lda_grouping` is one of map, region, grid, got 'window'"),
    (dict(pos_bias='none'), "`pos_bias` is 'paper' or 'lucidrains', got 'none'"),
    (dict(img_size=0), '`img_size` needs whole numbers from 1 up, got 0'),
    (dict(img_size='224'), "`img_size` needs whole numbers from 1 up, got '224'"),
    (dict(in_chans='3'), "`in_chans` needs whole numbers from 1 up, got '3'"),
    (dict(num_classes=-1), '`num_classes` needs whole numbers from 0 up, got -1'),
    (dict(group_size=True), '`group_size` needs whole numbers from 1 up, got True'),
    (dict(mlp_ratio=0), '`mlp_ratio` needs to be above 0, got 0'),
    (dict(norm_layer='foo'), "`norm_layer` is a class or a name that timm knows, got 'foo'"),
    (dict(act_layer='foo'), "`act_layer` is a class or a name that timm knows, got 'foo'"),
], ids=lambda v: str(v)[:50])
def test_wrong_arguments(args, message):
    with pytest.raises(ValueError) as e:
        timm.create_model('test_crossformer', **args)
    assert message in str(e.value)


def test_numbers_of_numpy_are_numbers():
    assert timm.create_model('test_crossformer', mlp_ratio=np.float32(2)).stages[0].blocks[0].mlp.fc1.out_features == 64
    assert timm.create_model('test_crossformer', num_classes=np.int64(5), interval=np.int64(2)).num_classes == 5
    assert json.dumps(plain_group_size('group_size', np.int64(7), (1, 1))) == '7'
    one, eight = np.int64(1), np.int64(8)
    model = timm.create_model('test_crossformer', embed_dim=2 * eight, head_dim=eight, depths=[one] * 4)
    assert [stage['num_chs'] for stage in model.feature_info] == [16, 32, 64, 128]
    assert json.dumps(plain_group_size('group_size', (np.int64(7), (4, np.int64(5))), (1, 1))) == '[7, [[4, 5]]]'


def test_unknown_arguments():
    with pytest.raises(TypeError, match=r'test_crossformer has no argument `gruop_size`. Did you mean `group_size`\?'):
        timm.create_model('test_crossformer', gruop_size=7)
    with pytest.raises(TypeError, match=r'has no argument `output_stride`. See `help\(timm_crossformer.CrossFormer\)`'):
        timm.create_model('test_crossformer', output_stride=16)
    with pytest.raises(TypeError):
        CrossFormer(window_size=7)


@pytest.mark.parametrize(('x', 'message'), [
    (torch.zeros(3, 64, 64), 'needs 4 dimensions [B, C, H, W], got 3'),
    (torch.zeros(1, 4, 64, 64), 'needs 3 channels in dimension 1, got 4'),
    (torch.zeros(1, 64, 64, 3), 'needs 3 channels in dimension 1, got 64'),
    (torch.zeros(1, 3, 0, 64), 'needs at least 1 x 1 pixels, got 0 x 64'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'needs a floating point dtype'),
], ids=['dims', 'channels', 'nhwc', 'empty', 'dtype'])
def test_wrong_inputs(x, message):
    for model in (small(), timm.create_model('test_crossformer', features_only=True)):
        with pytest.raises(ValueError) as e:
            model(x)
        assert message in str(e.value)


def test_group_size_forms():
    def sizes(**kwargs):
        model = timm.create_model('test_crossformer', depths=(2, 2, 4, 2), **kwargs)
        return [[block.attn.group_size for block in stage.blocks] for stage in model.stages]

    assert sizes(group_size=5) == [[(5, 5)] * n for n in (2, 2, 4, 2)]
    assert sizes(group_size=(4, (3, 5), [7, 6, 5, 4], [2, 3])) == [
        [(4, 4)] * 2, [(3, 5)] * 2, [(7, 7), (6, 6), (5, 5), (4, 4)], [(2, 2), (3, 3)]]
    assert sizes(group_size=7, lda_group_size=(8, 4, 2, 1))[2] == [(7, 7), (2, 2), (7, 7), (2, 2)]
    assert sizes(group_size=([[8, 10], [8, 10]], 7, 7, 7))[0] == [(8, 10), (8, 10)]
    assert sizes(group_size=([8, 10], 7, 7, (8, 10)))[3] == [(8, 10), (8, 10)]


def test_recorded_group_sizes_survive_json():
    pytest.importorskip('timm.models._input', reason='timm records arguments since 1.0.31')
    import json
    args = dict(group_size=((8, 10), (3, 5), 7, [2, 3]), interval=(4, 2, 1, 1))
    model = timm.create_model('test_crossformer', **args)
    again = timm.create_model('test_crossformer', **json.loads(json.dumps(model._model_args)))
    x = noise(1, 3, 150, 210)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), again.eval()(x))


@pytest.mark.parametrize('change', [lambda blocks: blocks.append(blocks[0]), lambda blocks: blocks.pop(1)])
def test_groups_of_changed_stages_are_chosen_block_by_block(change):
    model = small()
    change(model.stages[0].blocks)
    before = [block.attn.group_size for block in model.stages[0].blocks]
    with pytest.raises(ValueError, match='some were added or taken away'):
        model.set_input_size(group_size=3)
    assert [block.attn.group_size for block in model.stages[0].blocks] == before
    for block in model.stages[0].blocks:
        block.attn.set_groups((3, 3), 1, 'sda', False)
    assert model(torch.zeros(1, 3, 64, 64)).shape[0] == 1


def test_fit_groups_changes_nothing_where_the_group_size_divides():
    model, x = small(group_size=4, interval=(4, 2, 1, 1)), noise(1, 3, 64, 64)
    expected = model(x)
    model.set_input_size(fit_groups=True)
    torch.testing.assert_close(model(x), expected)
    other = noise(1, 3, 72, 104)
    fitted = model(other)
    model.set_input_size(fit_groups=False)
    assert (model(other) - fitted).abs().max() > 1e-3


def test_drop_path_and_dropout_act_in_training_only():
    model = small(drop_path_rate=0.5, drop_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5)
    x = noise(4, 3, 64, 64)
    torch.testing.assert_close(model(x), small()(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_explicit_and_fused_attention_agree():
    x = noise(2, 3, 75, 90)
    fused = small()(x)
    set_fused_attn(False)
    try:
        model = small()
    finally:
        set_fused_attn(True)
    assert not model.stages[0].blocks[0].attn.fused_attn
    torch.testing.assert_close(model(x), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_function_transforms_pass_through():
    model, x, label = small(), noise(3, 3, 50, 64), torch.tensor([1, 2, 3])
    params = dict(model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x[:, None]).squeeze(1), model(x), rtol=1e-5, atol=1e-5)

    def loss(params, x, label):
        logits = torch.func.functional_call(model, params, (x[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, label)
    for i in range(3):
        expected = torch.autograd.grad(loss(params, x[i], label[i]), list(params.values()))
        for name, grad in zip(params, expected, strict=True):
            torch.testing.assert_close(per_image[name][i], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings('ignore:.torch.jit.trace', 'ignore::torch.jit.TracerWarning')
def test_tracing_needs_no_special_mode():
    model, x = small(), noise(2, 3, 64, 64)
    traced = torch.jit.trace(model, x)  # checks itself by tracing again, without gradients
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('img_size', ['bad', 1.5, (32, 32, 32), 0], ids=str)
def test_a_refused_input_size_changes_nothing(img_size):
    model = small()
    before = model.group_size, model.stages[0].blocks[0].attn.group_size
    with pytest.raises(ValueError, match='`img_size`'):
        model.set_input_size(img_size, group_size=3)
    assert (model.group_size, model.stages[0].blocks[0].attn.group_size) == before
