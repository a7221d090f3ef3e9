"""Examples that need nothing but this package; tests/clients runs the others."""
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / 'examples'


@pytest.mark.slow
def test_a_field_on_the_globe_is_taken_to_the_next_step(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(sys, 'argv', ['', '--output', str(tmp_path), '--steps', '16', '--batch', '2'])
    runpy.run_path(str(EXAMPLES / 'train_weather.py'), run_name='__main__')
    last = capsys.readouterr().out.splitlines()[-2]
    found, seam, unchanged = map(float, re.findall(r'\d\.\d{4}', last))
    assert found < .95 * unchanged and seam < 1.2 * found
    assert (tmp_path / 'weather.png').stat().st_size > 10_000


def test_a_network_for_the_globe_takes_any_grid():
    module = runpy.run_path(str(EXAMPLES / 'train_weather.py'))
    model = module['NextStep'](3).eval()
    for height, width in ((33, 64), (50, 101)):
        x = torch.randn(1, 3, height, width)
        with torch.inference_mode():
            assert torch.equal(model(x), x)  # to begin with
        x.requires_grad_()
        torch.nn.init.normal_(model.head.weight, std=.1)
        first, = torch.autograd.grad(model(x)[..., -1].sum(), x)
        assert first[..., 0].abs().mean() > .1 * first[..., -2].abs().mean()  # both are neighbours of the last column
        torch.nn.init.zeros_(model.head.weight)
