"""Two gloo processes on the CPU run every check below once; each test looks at what both reported."""
import contextlib
import datetime
import traceback

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import timm_crossformer  # noqa: F401
from timm_crossformer.model import CrossFormerBlock

pytestmark = pytest.mark.slow

WORLD = 2


def _model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('test_crossformer', num_classes=5, **kwargs)


def _batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 70, 101, generator=generator), torch.tensor([0, 1, 2, 3])


def _mine(x, rank):
    return x.chunk(WORLD)[rank]


def _loss(model, images, labels):
    return F.cross_entropy(model(images), labels)


def _grads(model):
    return {name.removeprefix('module.'): p.grad for name, p in model.named_parameters()}


def _full(x):
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    scale = max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(
            _full(actual[name]), x, rtol=1e-4, atol=1e-5 * scale.item(), msg=lambda text, name=name: f'{name}: {text}')


def _reference(**kwargs):
    model = _model(**kwargs)
    _loss(model, *_batch()).backward()
    return model


def _shard(model):
    for module in model.modules():
        if isinstance(module, CrossFormerBlock):
            fully_shard(module)
    return fully_shard(model)


def ddp_gradients(rank, path):
    images, labels = (_mine(x, rank) for x in _batch())
    model = DistributedDataParallel(_model())
    for _ in range(2):  # an unused parameter would raise in the second iteration
        model.zero_grad()
        _loss(model, images, labels).backward()
    grads = _grads(model)
    _assert_same(grads, _grads(_reference()))
    flat = torch.cat([grad.flatten() for grad in grads.values()])
    others = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others)


def ddp_has_no_unused_parameters(rank, path):
    images, _ = _batch()
    for model in (_model(drop_path_rate=.2), _model(features_only=True), _model(pos_bias='lucidrains')):
        model = DistributedDataParallel(model.train())
        for _ in range(2):
            out = model(_mine(images, rank))
            sum(x.square().mean() for x in (out if isinstance(out, list) else [out])).backward()


def ddp_accumulates_without_sync(rank, path):
    images, labels = (_mine(x, rank) for x in _batch())
    model = DistributedDataParallel(_model())
    for i in range(len(images)):
        last = i == len(images) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            (_loss(model, images[i:i + 1], labels[i:i + 1]) / len(images)).backward()
    _assert_same(_grads(model), _grads(_reference()))


def ddp_checkpoints_activations(rank, path):
    images, labels = (_mine(x, rank) for x in _batch())
    model = _model()
    model.set_grad_checkpointing()
    model = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        _loss(model, images, labels).backward()
    _assert_same(_grads(model), _grads(_reference()))


def fsdp_gradients(rank, path, checkpointing=False):
    images, labels = (_mine(x, rank) for x in _batch())
    model = _model()
    model.set_grad_checkpointing(checkpointing)
    model = _shard(model)
    blocks = [m for m in model.modules() if isinstance(m, CrossFormerBlock)]
    assert all(type(p).__name__ == 'DTensor' for block in blocks for p in block.parameters())
    _loss(model, images, labels).backward()
    _assert_same(_grads(model), _grads(_reference()))


def fsdp_checkpoints_activations(rank, path):
    fsdp_gradients(rank, path, checkpointing=True)


def fsdp_evaluates_the_weights_of_the_moment(rank, path):
    images, labels = _batch()
    nets = [_shard(_model()), _model()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=.05) for net in nets]
    for _ in range(3):
        model, reference = (net.eval() for net in nets)
        with torch.no_grad():
            torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)
        for net, optimizer in zip(nets, optimizers, strict=True):
            _loss(net.train(), images, labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def fsdp_saves_and_resumes(rank, path):
    images, labels = (_mine(x, rank) for x in _batch())

    def start(seed):
        model = _shard(_model(seed))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer):
        _loss(model, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start(0)
    step(model, optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({'model': state, 'optimizer': optimizer_state}, checkpoint_id=path / 'checkpoint')
    if rank == 0:
        dcp_to_torch_save(path / 'checkpoint', path / 'checkpoint.pth')
        merged = torch.load(path / 'checkpoint.pth', weights_only=True)['model']
        torch.save(merged, path / 'model.pth')
    step(model, optimizer)

    resumed, optimizer = start(7)
    state, optimizer_state = get_state_dict(resumed, optimizer)
    dcp.load({'model': state, 'optimizer': optimizer_state}, checkpoint_id=path / 'checkpoint')
    set_state_dict(resumed, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    if rank == 0:
        plain = _model(7)
        plain.load_state_dict(torch.load(path / 'model.pth', weights_only=True))
    restored = {name: p.full_tensor() for name, p in resumed.named_parameters()}
    if rank == 0:
        _assert_same(dict(plain.named_parameters()), restored)
    step(resumed, optimizer)
    _assert_same(
        {name: p.full_tensor() for name, p in resumed.named_parameters()},
        {name: p.full_tensor() for name, p in model.named_parameters()},
    )


CHECKS = [
    ddp_gradients,
    ddp_has_no_unused_parameters,
    ddp_accumulates_without_sync,
    ddp_checkpoints_activations,
    fsdp_gradients,
    fsdp_checkpoints_activations,
    fsdp_evaluates_the_weights_of_the_moment,
    fsdp_saves_and_resumes,
]


def _work(rank, path):
    torch.set_num_threads(1)
    for check in CHECKS:
        folder = path / check.__name__
        folder.mkdir(exist_ok=True)
        # A group of its own: what fails on one rank only must not leave the other one waiting in the next check.
        dist.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD,
            timeout=datetime.timedelta(seconds=60))
        try:
            check(rank, folder)
            report = ''
        except Exception:
            report = traceback.format_exc()
        (folder / f'report{rank}').write_text(report)
        dist.destroy_process_group()


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks')
    mp.spawn(_work, args=(path,), nprocs=WORLD)
    return path


@pytest.mark.parametrize('check', [check.__name__ for check in CHECKS])
def test_two_processes(reports, check):
    for rank in range(WORLD):
        report = (reports / check / f'report{rank}').read_text()
        assert not report, f'rank {rank}:\n{report}'
