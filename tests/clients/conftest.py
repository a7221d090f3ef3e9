"""What every client test needs: the client itself, and proof that it trains the backbone."""
import importlib
import os

import pytest
import torch

import timm_crossformer  # noqa: F401


@pytest.fixture(scope='session')
def client():
    """Import a client; where it is missing the test is skipped, or fails if REQUIRE_CLIENTS is set."""
    def load(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            if os.environ.get('REQUIRE_CLIENTS') or e.name.split('.')[0] != name.split('.')[0]:
                raise
            pytest.skip(f'{name} is not installed')
    return load


@pytest.fixture
def check_training():
    """Check that gradients reach the backbone, and that a step along them does what they predict."""
    def check(loss_fn, backbone, unused=(), decrease=1e-3, rtol=.1):
        """
        Args:
            loss_fn: Returns the loss of one fixed batch.
            backbone: The CrossFormer inside the client.
            unused: Parameters that rightly get no gradient, by the beginning of their names.
            decrease: Part of the loss that a step is to take away; the learning rate follows from the gradient. None:
                no step, as the loss is not a function of the weights that its gradient describes.
            rtol: Tolerance of that decrease.
        """
        params = dict(backbone.named_parameters())
        assert params

        def loss():
            torch.manual_seed(0)  # dropout and sampling of anchors
            return loss_fn()

        before = loss()
        before.backward()
        # The last bias of a position MLP shifts all scores of a head alike, so its gradient is rounding noise or 0.
        dead = [
            name for name, p in params.items()
            if p.grad is None or not (p.grad.any() or name.endswith('pos_bias.mlp.9.bias'))
        ]
        assert all(p.grad.isfinite().all() for name, p in params.items() if name not in dead)
        assert [name for name in dead if not name.startswith(tuple(unused))] == []
        assert [prefix for prefix in unused if not any(name.startswith(prefix) for name in dead)] == []
        if decrease is None:
            return
        squared = sum(p.grad.double().square().sum() for p in params.values() if p.grad is not None).item()
        predicted = decrease * before.item()
        with torch.no_grad():
            for p in params.values():
                if p.grad is not None:
                    p -= predicted / squared * p.grad
            after = loss()
        assert before.item() - after.item() == pytest.approx(predicted, rel=rtol)
    return check
