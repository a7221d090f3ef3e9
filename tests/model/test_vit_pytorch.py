"""`crossformer_lucidrains` is vit-pytorch's network: same weights, same outputs as the real package."""
import pytest
import timm
import torch
from common import lively, noise
from vit_pytorch.crossformer import CrossFormer as Theirs


def pair(size, **theirs):
    """Build their network and ours with its weights."""
    args = dict(dim=(64, 128, 256, 512), depth=(2, 2, 8, 2), global_window_size=(8, 4, 2, 1), local_window_size=7)
    args.update(theirs)
    reference = lively(Theirs(**args, num_classes=10))
    model = timm.create_model(
        'crossformer_lucidrains',
        num_classes=10,
        embed_dim=args['dim'],
        depths=tuple(2 * d for d in args['depth']),
        num_heads=tuple(d // 32 for d in args['dim']),
        head_dim=32,
        group_size=args['local_window_size'],
        lda_group_size=args['global_window_size'],
    ).eval()
    model.load_state_dict(reference.state_dict())
    return reference, model


@pytest.mark.parametrize(('size', 'args'), [
    ((224, 224), {}),
    pytest.param((448, 448), {}, marks=pytest.mark.slow),
    ((224, 224), dict(dim=(32, 64, 96, 160), depth=(1, 1, 2, 1))),
    ((224, 224), dict(dim=(48, 80, 112, 200), depth=(1, 2, 1, 1))),  # channels that 32 does not divide
    ((256, 384), dict(dim=(32, 64, 64, 96), depth=(1, 1, 1, 1), local_window_size=4, global_window_size=(4, 4, 2, 1))),
], ids=lambda v: str(v)[:60])
def test_outputs_equal_vit_pytorch(size, args):
    reference, model = pair(size, **args)
    x = noise(2, 3, *size)
    with torch.inference_mode():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4 * expected.std().item())


def test_strips_are_one_group_here_and_windows_there():
    """The one difference: a map at most one group high or wide, but larger on the other side (docs/differences.md)."""
    reference, model = pair((256, 128), dim=(32, 64, 64, 96), depth=(1, 1, 1, 1), local_window_size=4)
    x = noise(1, 3, 256, 128)
    with torch.inference_mode():
        assert (model(x) - reference(x)).abs().max() > 1e-3


def test_other_sizes_run_where_vit_pytorch_raises():
    reference, model = pair((256, 256), dim=(32, 64, 64, 96), depth=(1, 1, 1, 1))
    x = noise(1, 3, 256, 384)
    with torch.inference_mode():
        with pytest.raises(Exception, match=r'divide|divisible'):
            reference(x)
        assert model(x).isfinite().all()
