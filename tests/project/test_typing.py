"""A program that uses the public names has types to check against."""
import subprocess
import sys
from pathlib import Path

import pytest

import timm_crossformer

PROGRAM = '''
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

import timm_crossformer
from timm_crossformer import CrossFormer
from timm_crossformer.checkpoints import CheckpointError, convert_file, fetch, load_model, verify_directory
from timm_crossformer.explain import attention_from
from timm_crossformer.export import export_model, verify_exported

version: str = timm_crossformer.__version__
model: CrossFormer = CrossFormer(num_classes=10, group_size=(7, 7, 7, 7))
model.set_input_size(img_size=(224, 320), lda_grouping='region')
logits: Tensor = model(torch.rand(1, 3, 64, 64))
maps: List[List[Tensor]] = attention_from(model, torch.rand(1, 3, 64, 64), (0.5, 0.5))
path: Path = export_model(model, 'x.onnx')
differences: Dict[Tuple[int, int, int], float] = verify_exported(model, path)
try:
    written = convert_file('x.pth', 'x')
except CheckpointError as e:
    print(e.exit_code + 1)
size: int = written.size
names: List[str] = [check.check for check in verify_directory('x') if not check.ok]
tag: str = fetch('crossformer_tiny').tag
net: Any = load_model(weights='x.pth')
'''


@pytest.mark.slow
@pytest.mark.parametrize('wrong', [None, "number: int = fetch('crossformer_tiny').tag", 'convert_file(3, 4)'])
def test_mypy_knows_the_public_names(wrong, tmp_path):
    assert Path(timm_crossformer.__file__).with_name('py.typed').is_file()
    (tmp_path / 'program.py').write_text(PROGRAM + (wrong or '') + '\n')
    (tmp_path / 'mypy.ini').write_text(
        '[mypy]\nstrict = true\nignore_missing_imports = true\nfollow_imports_for_stubs = true\n'
        '[mypy-timm.*]\nfollow_imports = skip\n')
    out = subprocess.run(
        [sys.executable, '-m', 'mypy', 'program.py'], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if wrong is None:
        assert out.returncode == 0, out.stdout + out.stderr
    else:
        assert out.returncode == 1 and out.stdout.count('error:') in (1, 2), out.stdout + out.stderr
