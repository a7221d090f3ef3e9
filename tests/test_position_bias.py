"""Position bias at true offsets, and a cache nobody can see."""
import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from common import noise, small

from timm_crossformer.layers import DynamicPosBias
from timm_crossformer.layers.attention import run_bias
from timm_crossformer.layers.position_bias import _tables, bias_table, expand_bias


def make(dim=4, heads=3, legacy=None):
    module = DynamicPosBias(dim, heads)
    for i, p in enumerate(module.parameters()):
        p.data.copy_(noise(*p.shape, seed=i))
    module.legacy_size = legacy
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize('size', [(1, 1), (1, 4), (3, 2), (4, 4)], ids=str)
@pytest.mark.parametrize('legacy', [None, (4, 4)], ids=['paper', 'lucidrains'])
def test_every_pair_gets_the_bias_of_its_offset(size, legacy):
    module = make(legacy=legacy)
    bias = expand_bias(module(*size), *size, 0, size[0])
    places = list(itertools.product(range(size[0]), range(size[1])))
    for (i, query), (j, key) in itertools.product(enumerate(places), enumerate(places)):
        dy, dx = query[0] - key[0], query[1] - key[1]
        if legacy is not None:  # the published lookup of vit-pytorch: entry k of a table with rows of 2w + 1
            w = legacy[0]
            k = (dy + w - 1) * (2 * w - 1) + dx + w - 1
            dy, dx = k // (2 * w + 1) - w, k % (2 * w + 1) - w
        expected = module.mlp(torch.tensor([float(dy), float(dx)]))
        torch.testing.assert_close(bias[:, i, j], expected, rtol=1e-5, atol=1e-5)


def test_bands_of_rows_and_smaller_groups_are_parts_of_the_whole():
    module = make()
    table = module(5, 6)
    whole = expand_bias(table, 5, 6, 0, 5)
    bands = [expand_bias(table, 5, 6, a, b) for a, b in ((0, 2), (2, 3), (3, 5))]
    turned = expand_bias(table, 5, 6, 0, 5, reverse_keys=True)
    assert torch.equal(turned.flip(2), whole)
    assert torch.equal(torch.cat(bands, dim=1), whole)
    part = whole.unflatten(1, (5, 6)).unflatten(3, (5, 6))[:, :3, :2, :3, :2].flatten(3).flatten(1, 2)
    assert torch.equal(expand_bias(table, 3, 2, 0, 3), part)
    torch.testing.assert_close(part, expand_bias(module(3, 2), 3, 2, 0, 3))


@pytest.mark.parametrize('legacy', [None, (4, 4)], ids=['paper', 'lucidrains'])
def test_table_from_parameters_alone(legacy):
    module = make(legacy=legacy)
    torch.testing.assert_close(bias_table(list(module.parameters()), module.eps(), 4, 3, legacy), module(4, 3))


def edit_in_place(m):
    m.mlp[0].weight.mul_(2)


def edit_data(m):
    m.mlp[3].bias.data.add_(1)


def edit_one_number(m):
    m.mlp[9].bias.data[0] += 1e-3


def replace_parameter(m):
    m.mlp[9].weight = torch.nn.Parameter(m.mlp[9].weight * 3, requires_grad=False)


def replace_data(m):
    m.mlp[9].weight.data = m.mlp[9].weight * 3


def load_weights(m):
    m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()})


def load_weights_assign(m):
    m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True)


def step_optimizer(m):
    m.requires_grad_(True)
    m(3, 3).sum().backward()
    torch.optim.AdamW(m.parameters(), lr=0.1).step()
    m.requires_grad_(False)


def to_double(m):
    m.double()


def to_half(m):
    m.to(torch.bfloat16)


def other_lookup(m):
    m.legacy_size = (3, 3)


CHANGES = [
    edit_in_place, edit_data, edit_one_number, replace_parameter, replace_data, load_weights, load_weights_assign,
    step_optimizer, to_double, to_half, other_lookup,
]


@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
def test_cache_follows_every_change(change):
    module = make()
    before = module(3, 3)
    assert module(3, 3) is before  # kept
    change(module)
    after = module(3, 3)
    fresh = DynamicPosBias(4, 3).to(after.dtype).eval().requires_grad_(False)
    fresh.load_state_dict(module.state_dict())
    fresh.legacy_size = module.legacy_size
    assert torch.equal(after, fresh(3, 3))
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert module(3, 3) is after  # kept again


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_start_without_the_cache(clone):
    module = make()
    table = module(3, 3)
    twin = clone(module)
    assert _tables.get(twin.mlp[0].weight) is None
    twin.mlp[0].weight.mul_(2)
    assert not torch.equal(twin(3, 3), table)
    assert module(3, 3) is table


def test_cache_stays_small():
    module = make()
    for n in range(1, 40):
        module(n, 1)
    assert len(_tables[module.mlp[0].weight][1]) <= 8


def bias_of(table, heads, gh, gw):
    return run_bias(torch.zeros(1), table, heads, gh, gw)  # of tokens in fp32


def test_biases_are_kept_with_a_remembered_table_only():
    module = make()
    with torch.inference_mode():
        table = module(4, 5)
        bias = bias_of(table, 3, 3, 5)
        assert bias_of(module(4, 5), 3, 3, 5) is bias
    assert torch.equal(bias, expand_bias(table, 3, 5, 0, 3)) and not bias.is_inference()
    module.mlp[9].weight.data.mul_(2)
    assert bias_of(module(4, 5), 3, 3, 5) is not bias
    assert bias_of(table, 3, 4, 4).shape == (3, 16, 16)
    other = table.clone()  # as in training
    assert bias_of(other, 3, 3, 5) is not bias_of(other, 3, 3, 5)
    assert bias_of(module(10, 30), 3, 10, 30) is not bias_of(module(10, 30), 3, 10, 30)  # large


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(mlp):
    mlp[9].__class__ = Doubled


def activation(mlp):
    mlp[2] = torch.nn.Tanh()


def nested(mlp):
    mlp[9] = torch.nn.Sequential(mlp[9], torch.nn.Linear(3, 3)).eval().requires_grad_(False)


def hook(mlp):
    mlp[9].register_forward_hook(lambda *args: args[2] + 1)


def forward(mlp):
    mlp[0].forward = lambda x: x[..., :1].expand(*x.shape[:2], 4)


def one_more(mlp):
    mlp.append(torch.nn.Tanh())


def no_bias(mlp):
    mlp[9].bias = None


LAYERS = [doubled, activation, nested, hook, forward, one_more, no_bias]


@pytest.mark.parametrize('change', LAYERS, ids=lambda f: f.__name__)
def test_another_layer_ends_the_cache(change):
    module = make()
    before = module(3, 3)
    change(module.mlp)
    after = module(3, 3)
    expected = copy.deepcopy(module)(3, 3)
    assert not torch.allclose(after, before)
    assert torch.equal(after, expected)
    module.mlp[3].weight.data.mul_(2)
    assert torch.equal(module(3, 3), copy.deepcopy(module)(3, 3))


def test_the_cache_ends_with_its_parameters():
    module = make()
    module(3, 3)
    weight = weakref.ref(module.mlp[0].weight)
    count = len(_tables)
    del module
    gc.collect()
    assert weight() is None and len(_tables) < count


def test_gradients_flow_in_evaluation():
    module = make().requires_grad_(True)
    module(3, 3)
    module(3, 3).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_table_cached_under_inference_mode_serves_gradients():
    model, x = small().requires_grad_(False), noise(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    x.requires_grad_()
    logits = model(x)
    logits.sum().backward()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-5, atol=1e-5)  # sums in another order
    assert torch.equal(logits.detach(), small().requires_grad_(False)(x).detach())  # which never had a cache
    assert x.grad.abs().sum() > 0


def test_autocast_neither_sees_nor_fills_the_cache_with_low_precision():
    module = make()
    with torch.autocast('cpu', torch.bfloat16):
        table = module(3, 3)
    assert table.dtype == torch.float32
    assert torch.equal(table, make()(3, 3))


def test_functional_call_uses_the_given_weights():
    model = small().requires_grad_(False)
    x = noise(1, 3, 64, 64)
    model(x)
    doubled = {k: v * 2 if 'pos_bias' in k else v for k, v in model.named_parameters()}
    result = torch.func.functional_call(model, doubled, (x,))
    model.load_state_dict(doubled)
    torch.testing.assert_close(result, model(x))


def test_threads_agree():
    model = small().requires_grad_(False)
    images = [noise(1, 3, h, 64, seed=h) for h in (32, 64, 80, 96, 100, 132, 65, 47, 71, 90)]
    expected = [model(x) for x in images]
    failures = []

    def work(offset):
        for i in range(len(images)):
            j = (i * (2 * offset + 1)) % len(images)
            if not torch.equal(model(images[j]), expected[j]):
                failures.append(j)

    workers = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.gpu
def test_cache_follows_changes_on_cuda():
    module = make().cuda()
    table = module(3, 3)
    assert module(3, 3) is table
    module.mlp[0].weight.mul_(2)
    assert not torch.equal(module(3, 3), table)


def test_the_eps_of_a_norm_counts():
    module = make()
    with torch.no_grad():
        before = module(4, 5)
        for norm in (module.mlp[1], module.mlp[4], module.mlp[7]):
            norm.eps = 1.
        after = module(4, 5)
        parameters = list(module.mlp.parameters())
        torch.testing.assert_close(bias_table(parameters, module.eps(), 4, 5, None), after)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(module(4, 5), after)  # with gradients: computed anew
