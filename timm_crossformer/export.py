"""Export a model to ONNX, torch.export or OpenVINO: one graph for every batch and, from 33 px up, every image size."""
import importlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ._modes import evaluating
from .layers import CrossScaleEmbed

FORMATS = {'onnx': '.onnx', 'torch': '.pt2', 'openvino': '.xml'}
_NEEDS = {'onnx': ('onnx', 'onnxscript'), 'torch': (), 'openvino': ('onnx', 'onnxscript', 'openvino')}
_RUNS = {'onnx': ('onnxruntime',), 'torch': (), 'openvino': ('openvino',)}

MIN_SIZE, MAX_SIZE = 33, 8192  # 33 px are the first size whose last map is more than one token
PROBES = ((2, 224, 224), (1, 33, 97), (3, 191, 70), (1, 256, 321))  # batch, height, width


def export_program(model: nn.Module, size: Tuple[int, int] = (230, 310), dynamic: bool = True) -> ExportedProgram:
    """Trace a classifier or a `features_only` pyramid with torch.export.

    Args:
        model: In evaluation mode.
        size: Image size to trace with; the only one the program takes unless `dynamic`.
        dynamic: Leave batch, height and width open: 1 image or more, 33 to 8,192 px.

    Raises:
        ValueError: `fit_groups` with `dynamic`: the choice of groups looks at divisors of the size.
    """
    if dynamic and any(getattr(module, 'fit_groups', False) for module in model.modules()):
        raise ValueError('`fit_groups` chooses groups for one image size. Export with dynamic=False, or without it.')
    parameter = next(model.parameters())
    image = torch.zeros(2 if dynamic else 1, _channels(model), *size, device=parameter.device, dtype=parameter.dtype)
    shapes = None
    if dynamic:
        side: Dict[str, int] = dict(min=MIN_SIZE, max=MAX_SIZE)
        shapes = ({0: Dim('batch', min=1), 2: Dim('height', **side), 3: Dim('width', **side)},)
    with torch.no_grad():
        return torch.export.export(
            model, (image,), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=dynamic)


def export_model(
        model: nn.Module,
        path: Union[str, Path],
        format: str = 'onnx',
        size: Tuple[int, int] = (230, 310),
        dynamic: bool = True,
) -> Path:
    """Export a model to a file. The file appears when it is complete.

    Args:
        model: Classifier or `features_only` pyramid.
        path: File to write: .onnx, .pt2, or .xml (OpenVINO puts the weights in a .bin beside it).
        format: 'onnx', 'torch' or 'openvino'.
        size: Image size to trace with; the only one the file takes unless `dynamic`.
        dynamic: Leave batch, height and width open.

    Returns:
        The path.

    Raises:
        ValueError: Another format, or a path with another suffix.
        ImportError: A package is missing.
    """
    if format not in FORMATS:
        raise ValueError(f'`format` is one of {", ".join(FORMATS)}, got {format!r}.')
    path = Path(path)
    if path.suffix != FORMATS[format]:
        raise ValueError(f'A file of format {format} ends in {FORMATS[format]}, got {path.name}.')
    _require(format, _NEEDS[format])
    with evaluating(model):
        program = export_program(model, size, dynamic)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export-') as folder:
        target = Path(folder) / path.name
        if format == 'torch':
            torch.export.save(program, target)
        else:
            onnx_path = target.with_suffix('.onnx')
            names = _output_names(model)
            # Runtimes optimise what they load; here it would take longer than the rest of the export.
            onnx_program: Any = torch.onnx.export(
                program, dynamo=True, input_names=['image'], output_names=names, verbose=False, optimize=False)
            for node in onnx_program.model.graph:
                node.metadata_props.clear()  # stack traces, with the paths of this machine
            onnx_program.save(onnx_path)
            if format == 'openvino':
                openvino = importlib.import_module('openvino')
                openvino.save_model(openvino.convert_model(onnx_path), target, compress_to_fp16=False)
                onnx_path.unlink()
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == path.suffix):  # the main file last
            shutil.move(file, path.parent / file.name)
    return path


def load_exported(path: Union[str, Path]) -> Callable[[Tensor], List[Tensor]]:
    """Load an exported file as a function from images to a list of outputs, all on the CPU.

    Raises:
        ValueError: The suffix is of no known format.
        ImportError: The package that runs the format is missing.
    """
    path = Path(path)
    formats = {suffix: name for name, suffix in FORMATS.items()}
    if path.suffix not in formats:
        raise ValueError(f'An exported file ends in {", ".join(formats)}, got {path.name}.')
    format = formats[path.suffix]
    _require(format, _RUNS[format])
    if format == 'torch':
        program = torch.export.load(path).module()
        return lambda x: _as_list(program(x))
    if format == 'onnx':
        session = importlib.import_module('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {'image': x.numpy()})]
    openvino = importlib.import_module('openvino')
    compiled = openvino.compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: [torch.from_numpy(y.copy()) for y in compiled(x.numpy()).to_tuple()]


def verify_exported(
        model: nn.Module,
        path: Union[str, Path],
        probes: Sequence[Tuple[int, int, int]] = PROBES,
) -> Dict[Tuple[int, int, int], float]:
    """Run an exported file beside the model on random images.

    Args:
        model: What was exported.
        path: The file.
        probes: (batch, height, width) of the images.

    Returns:
        Largest difference of an output, over the standard deviation of that output, for each of `probes`.
    """
    run = load_exported(path)
    differences = {}
    for probe in probes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(probe[0], _channels(model), *probe[1:], generator=generator)
        with torch.no_grad(), evaluating(model):
            expected = _as_list(model(x))
        differences[probe] = max(
            ((a - b).abs().max() / b.std()).item() for a, b in zip(run(x), expected, strict=True))
    return differences


def _channels(model: Any) -> int:
    stem = getattr(model, 'stem', None)
    if not isinstance(stem, CrossScaleEmbed):
        raise ValueError(
            f'`model` needs to be a CrossFormer of timm_crossformer, got {type(model).__name__}. Others export by '
            "timm's own onnx_export.py, or torch.export.")
    return stem.in_chans


def _as_list(outputs: Any) -> List[Tensor]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _output_names(model: Any) -> List[str]:
    if hasattr(model, 'head'):
        return ['logits']
    return [f'stage{i}' for i in model.feature_info.out_indices]


def _require(format: str, packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise ImportError(
                f'Format {format} needs the package {package}. Run `pip install timm_crossformer[export]`.') from e
