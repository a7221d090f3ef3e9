"""Networks as files of one image size, in the runtimes that deploy them; ours and peers by the same exporter."""
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any, Callable, List, Tuple

import torch
from cases import CALIBRATION, Case, build
from torch import Tensor, nn

from timm_crossformer import CrossFormer
from timm_crossformer.export import export_model
from timm_crossformer.precision import to_int8

_folder = functools.cache(lambda: tempfile.TemporaryDirectory(prefix='bench-'))
_numbers = itertools.count()


@functools.cache
def onnx_file(contestant: str, task: str, built_for: Any, pixels: Tuple[int, int], int8: bool) -> Path:
    """Export a contestant with an open batch.

    Args:
        contestant, task: As in `Case`.
        built_for: Image size that `build` takes.
        pixels: Image size of the file.
        int8: Whether linear layers and convolutions multiply in int8. Ranges are those of `CALIBRATION` images of
            noise: the time does not depend on them.
    """
    path = Path(_folder().name) / f'{next(_numbers)}.onnx'
    if int8:
        full = onnx_file(contestant, task, built_for, pixels, False)
        generator = torch.Generator().manual_seed(0)
        to_int8(full, path, (torch.randn(1, 3, *pixels, generator=generator) for _ in range(CALIBRATION)))
        return path
    model: nn.Module = build(contestant, task, 'eager', built_for, 'fp32', 'cpu')[0].eval()
    if _is_ours(model):
        return export_model(model, path, size=pixels, dynamic='batch')
    with torch.no_grad():
        torch.onnx.export(
            model, (torch.zeros(2, 3, *pixels),), path, dynamo=True, input_names=['image'], verbose=False,
            dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    return path


def _is_ours(model: nn.Module) -> bool:
    return any(isinstance(module, CrossFormer) for module in model.modules())


def load(case: Case, built_for: Any) -> Callable[[Tensor], Any]:
    """Return a function that runs a case's file, given images."""
    runtime, _, dtype = case.mode.partition('-')
    path = onnx_file(case.contestant, case.task, built_for, case.pixels, dtype == 'int8')
    run = {'onnxruntime': _onnxruntime, 'openvino': _openvino}[runtime](path, case)

    def forward(x: Tensor) -> Any:
        found = [torch.from_numpy(array) for array in run(x.numpy())]
        return found if case.task == 'features' else found[0]

    return forward


def _onnxruntime(path: Path, case: Case) -> Callable[[Any], List[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'image': images})


def _openvino(path: Path, case: Case) -> Callable[[Any], List[Any]]:
    import openvino

    hint = {'fp32': 'f32', 'bf16': 'bf16'}[case.dtype]
    model = openvino.convert_model(path)
    model.reshape([case.batch, 3, *case.pixels])
    compiled = openvino.compile_model(
        model, 'CPU', {'INFERENCE_PRECISION_HINT': hint, 'INFERENCE_NUM_THREADS': case.threads})
    return lambda images: [array.copy() for array in compiled(images).to_tuple()]
