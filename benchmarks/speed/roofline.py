"""Estimate on paper where the time of inference goes on a GPU. No GPU is needed, and none was asked.

    python benchmarks/speed/roofline.py     writes results/roofline.csv

The model runs on fake CUDA tensors, which have shapes but no numbers. Each operator that reaches the dispatcher has
FLOPs by torch's formulas, bytes (its arguments and results moved once), and a launch. It takes as long as the slowest
of the three on a card with these figures: what an eager run would take that reached peak and bandwidth everywhere. A
lower bound, then, and good for comparisons only.
"""
import itertools
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pandas as pd
import timm
import torch
from cases import CONVNEXT, DTYPES, FORM, FORMS, OURS, SWIN, TAKES_IMG_SIZE, pixels_of
from operators import KINDS, OTHERS, kind_of
from rows import RESULTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Dense peaks (TFLOP/s) and bandwidth (GB/s): "NVIDIA A100 Tensor Core GPU datasheet", A100 80GB SXM, and "NVIDIA H100
# Tensor Core GPU datasheet", H100 SXM, whose figure for bf16 is with sparsity: half of it. fp32 is without TF32,
# PyTorch's default for linear layers.
CARDS = {
    'A100': {'bf16': 312, 'fp32': 19.5, 'bandwidth': 2039},
    'H100': {'bf16': 1979 / 2, 'fp32': 67, 'bandwidth': 3350},
}
LAUNCH = 5e-6  # seconds of an operator that does nothing, in eager mode; assumed, no data sheet has it
# None calls PyTorch's fused attention, which fake tensors would take apart.
MODELS = [*OURS[:3], *FORMS[:2], SWIN, CONVNEXT]
SHAPES = [('224', 1), ('224', 8), ('224', 128), ('800x1344', 1)]


class Operators(TorchDispatchMode):
    """Note of every operator that does something: kind, FLOPs, bytes, launches."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: List[Tuple[str, int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.is_view or 'view' in str(func) or 'empty' in str(func) or not results:
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in (*given, *results))
        self.notes.append((kind_of(str(func).replace('.', '::', 1)), flops, moved, 1))
        return out


def count(model: str, size: str, batch: int, dtype: str) -> pd.DataFrame:
    """List the operators of inference on CUDA: kind, flops, bytes, launches.

    Args:
        model: A timm model.
        size: Pixels, '224' or '800x1344'.
        batch: Images.
        dtype: 'bf16', 'fp16' or 'fp32', of weights and images.
    """
    pixels = pixels_of(size)
    sized = {'img_size': pixels} if model in TAKES_IMG_SIZE else {}
    network: Any = timm.create_model(model.removesuffix(FORM), device='meta', **sized).eval()
    if model.endswith(FORM):
        network = timm.utils.reparameterize_model(network)
    with FakeTensorMode(), torch.no_grad():
        network._apply(lambda x: torch.empty(
            x.shape, dtype=DTYPES[dtype] if x.is_floating_point() else x.dtype, device='cuda'))
        image = torch.empty(batch, 3, *pixels, dtype=DTYPES[dtype], device='cuda')
        with Operators() as operators:
            network(image)
    return pd.DataFrame(operators.notes, columns=['kind', 'flops', 'bytes', 'launches'])


def estimate(operators: pd.DataFrame, card: str, dtype: str) -> pd.DataFrame:
    """Estimate the seconds of every operator on a card, by what it computes, moves and launches."""
    return pd.DataFrame({
        'computing': operators['flops'] / (CARDS[card][dtype] * 1e12),
        'moving': operators['bytes'] / (CARDS[card]['bandwidth'] * 1e9),
        'launching': operators['launches'] * LAUNCH,
    })


def write(folder: Path = RESULTS, models: Sequence[str] = MODELS, dtypes: Sequence[str] = ('bf16', 'fp32')) -> None:
    """Write a row for each model, shape, dtype and kind of operator."""
    frames = []
    for model, (size, batch), dtype in itertools.product(models, SHAPES, dtypes):
        operators = count(model, size, batch, dtype)
        times = {f'{card}_ms_estimate': estimate(operators, card, dtype).max(axis=1) * 1e3 for card in CARDS}
        kinds = operators.assign(**times).groupby('kind').sum().reindex([*KINDS, OTHERS]).dropna()
        frames.append(kinds.reset_index().assign(
            model=model, size=size, batch=batch, dtype=dtype, gflops=(kinds['flops'] / 1e9).round(4).values,
            mib=(kinds['bytes'] / 2 ** 20).round(3).values))
    columns = ['model', 'size', 'batch', 'dtype', 'kind', 'launches', 'gflops', 'mib', *times]
    pd.concat(frames)[columns].round(4).astype({'launches': int}).to_csv(folder / 'roofline.csv', index=False)


if __name__ == '__main__':
    sys.exit(write())
