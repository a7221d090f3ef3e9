"""Export a model to ONNX, torch.export or OpenVINO.

One graph for every batch and, from 33 px up, every image size; or one for a size, of constants and few operators.
"""
import importlib
import io
import itertools
import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from timm.data import ImageNetInfo, create_transform, get_img_extensions, resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ._modes import evaluating
from ._torch import as_written
from .fixed import fix
from .layers import CrossScaleEmbed
from .precision import to_half, to_int8

FORMATS = {'onnx': '.onnx', 'torch': '.pt2', 'openvino': '.xml'}
_NEEDS = {'onnx': ('onnx', 'onnxscript'), 'torch': (), 'openvino': ('onnx', 'onnxscript', 'openvino')}
_RUNS = {'onnx': ('onnxruntime',), 'torch': (), 'openvino': ('openvino',)}

MIN_SIZE, MAX_SIZE = 33, 8192  # 33 px are the first size whose last map is more than one token
OPSET = 20  # of ONNX: the first with GELU
_DTYPES = {
    'tensor(float)': torch.float32, 'tensor(float16)': torch.float16, 'tensor(double)': torch.float64,
    'tensor(bfloat16)': torch.bfloat16}
PROBES = ((2, 224, 224), (1, 33, 97), (3, 191, 70), (1, 256, 321))  # batch, height, width


def export_program(
        model: nn.Module,
        size: Tuple[int, int] = (230, 310),
        dynamic: Union[bool, str] = True,
        batch: int = 1,
) -> ExportedProgram:
    """Trace a classifier or a `features_only` pyramid with torch.export.

    A program for one image size holds constants where one for all sizes computes groups and position biases.

    Args:
        model: In evaluation mode.
        size: Image size to trace with, (height, width); the only one the program takes unless `dynamic` is True.
        dynamic: True leaves batch, height and width open: 1 image or more, 33 to 8,192 px. 'batch' leaves the batch
            open alone. False leaves nothing open.
        batch: Images at a time, where the batch is not left open.

    Raises:
        ValueError: `fit_groups` with open sizes: the choice of groups looks at divisors of the size. Another value of
            `dynamic`. A batch or size below 1, or a `batch` beside an open one.
    """
    if dynamic not in (True, False, 'batch'):
        raise ValueError(f"`dynamic` is True, False or 'batch', got {dynamic!r}.")
    if len(size) != 2 or min(*size, batch) < 1:
        raise ValueError(f'`size` is (height, width) and `batch` a number, from 1 up, got {size!r} and {batch!r}.')
    if dynamic and batch != 1:
        raise ValueError(f'`batch` is for a batch that is not left open, got {batch}. Leave it out, or `dynamic`.')
    if dynamic is True and any(getattr(module, 'fit_groups', False) for module in model.modules()):
        raise ValueError('`fit_groups` chooses groups for one image size. Export with dynamic=False, or without it.')
    model = as_written(model)
    parameter = _first_tensor(model)
    channels = _channels(model)
    like: Dict[str, Any] = dict(device=parameter.device, dtype=parameter.dtype)
    if dynamic is not True:
        model = fix(model, torch.zeros(1, channels, *size, **like))
    image = torch.zeros(2 if dynamic else batch, channels, *size, **like)  # 1 would be taken for a constant
    shapes = None
    if dynamic:
        side: Dict[str, int] = dict(min=MIN_SIZE, max=MAX_SIZE)
        sides = {2: Dim('height', **side), 3: Dim('width', **side)} if dynamic is True else {}
        shapes = ({0: Dim('batch', min=1), **sides},)
    with torch.no_grad():
        program = torch.export.export(
            model, (image,), dynamic_shapes=shapes, strict=False,
            prefer_deferred_runtime_asserts_over_guards=dynamic is True)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)  # paths of this machine
    return program


def export_model(
        model: nn.Module,
        path: Union[str, Path],
        format: str = 'onnx',
        size: Tuple[int, int] = (230, 310),
        dynamic: Union[bool, str] = True,
        batch: int = 1,
        dtype: str = 'fp32',
        calibrate: Optional[Iterable[Tensor]] = None,
) -> Path:
    """Export a model to a file, and what has to be done to an image before to a JSON file beside it.

    Both appear when they are complete. The JSON file is named after the other, model.onnx.json.

    Args:
        model: Classifier or `features_only` pyramid.
        path: File to write: .onnx, .pt2, or .xml (OpenVINO puts the weights in a .bin beside it).
        format: 'onnx', 'torch' or 'openvino'.
        (others): See `export_program`. An ONNX file of open sizes calls them batch, height and width.
        dtype: 'fp32', the precision of the model; 'fp16', for GPUs, with norms and softmax in fp32; or 'int8', linear
            layers and convolutions in int8. The latter two make ONNX files from models in fp32.
        calibrate: For int8, batches of images as the model gets them; some hundred images serve.

    Returns:
        The path.

    Raises:
        ValueError: Another format, or a path with another suffix; a model in bfloat16 for ONNX; what `export_program`
            refuses.
        ImportError: A package is missing.
    """
    if format not in FORMATS:
        raise ValueError(f'`format` is one of {", ".join(FORMATS)}, got {format!r}.')
    path, model = Path(path), as_written(model)
    if path.suffix != FORMATS[format]:
        raise ValueError(f'A file of format {format} ends in {FORMATS[format]}, got {path.name}.')
    if dtype not in ('fp32', 'fp16', 'int8'):
        raise ValueError(f'`dtype` is one of fp32, fp16, int8, got {dtype!r}.')
    if dtype != 'fp32' and (format != 'onnx' or _first_tensor(model).dtype != torch.float32):
        raise ValueError(f'`dtype` {dtype} is for ONNX files of models in fp32. Use format onnx, and `model.float()`.')
    if format != 'torch' and _first_tensor(model).dtype == torch.bfloat16:
        raise ValueError(
            f'ONNX of opset {OPSET}, through which {format} files are made, has no convolution in bfloat16. Export '
            "`model.float()`, for half precision with dtype='fp16', or format torch.")
    if (dtype == 'int8') != (calibrate is not None):
        raise ValueError("`dtype` 'int8' and `calibrate` go together: int8 needs images, and nothing else does.")
    if dtype == 'int8' and dynamic is True:
        raise ValueError("`dtype` 'int8' is for files of one image size. Export with dynamic=False or 'batch'.")
    _require(format, _NEEDS[format] + (() if dtype == 'fp32' else ('onnxruntime',)))
    with evaluating(model):
        program = export_program(model, size, dynamic, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export-') as folder:
        target = Path(folder) / path.name
        if format == 'torch':
            archive = io.BytesIO()  # PyTorch's own writer ends the process where a disk is full
            torch.export.save(program, archive)
            target.write_bytes(archive.getbuffer())
        else:
            onnx_path = target.with_suffix('.onnx')
            _save_onnx(program, onnx_path, _output_names(model))
            if dtype != 'fp32':
                full = onnx_path.rename(onnx_path.with_suffix('.full'))
                if calibrate is None:
                    to_half(full, onnx_path)
                else:
                    to_int8(full, onnx_path, calibrate)
                full.unlink()
            if format == 'openvino':
                openvino = importlib.import_module('openvino')
                try:
                    openvino.save_model(openvino.convert_model(onnx_path), target, compress_to_fp16=False)
                except RuntimeError as e:  # a full disk, too
                    raise OSError(f'OpenVINO could not write {path}: {e}') from e
                onnx_path.unlink()
        side = size if dynamic is not True else None
        text = json.dumps(describe_input(model, side), indent=2)
        target.with_name(f'{path.name}.json').write_text(text + '\n', encoding='utf-8')
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == path.suffix):  # the main file last
            shutil.move(file, path.parent / file.name)
    return path


def _first_tensor(model: nn.Module) -> Tensor:
    """Return a weight, also of a model whose weights are buffers."""
    return next(itertools.chain(model.parameters(), model.buffers()))


def describe_input(model: Any, size: Optional[Tuple[int, int]] = None) -> Dict[str, Any]:
    """Say how an image becomes what a model takes, in terms that need neither timm nor PyTorch.

    Args:
        model: Classifier or pyramid.
        size: Image size of the file, (height, width); the model's own if None.

    Returns:
        A dict for JSON. `preprocessing`: an RGB image is scaled with `interpolation` until it covers `resize` (height,
        width), or by `crop_mode` 'squash' to just that; cut to the `crop` in its centre, divided by 255, less `mean`,
        over `std`, for each channel. `labels` are the names of classes, or null.
    """
    data = resolve_model_data_config(model)
    height, width = size or data['input_size'][1:]
    config = getattr(model, 'pretrained_cfg', None) or {}
    labels = config.get('label_names')
    number = model.num_classes if hasattr(model, 'head') else 0
    if labels is None or len(labels) != number:
        labels = [ImageNetInfo().index_to_description(i) for i in range(1000)] if number == 1000 else None
    return {
        'model': config.get('architecture'),
        'tag': config.get('tag') or None,
        'input': {'name': 'image', 'layout': 'NCHW', 'channels': 'RGB', 'size': [height, width]},
        'preprocessing': {
            'resize': [math.floor(side / data['crop_pct']) for side in (height, width)], 'crop': [height, width],
            'crop_mode': data['crop_mode'], 'interpolation': data['interpolation'],
            'mean': list(data['mean']), 'std': list(data['std'])},
        'outputs': _output_names(model),
        'labels': None if labels is None else list(labels),
    }


def calibration(model: nn.Module, folder: Union[str, Path], size: Tuple[int, int], batch: int = 1) -> Iterator[Tensor]:
    """Yield the images of a folder and its subfolders in batches [batch, 3, height, width], as the model gets them.

    Raises:
        ValueError: There are fewer images than a batch. A file that is none is passed over.
    """
    files = [file for file in sorted(Path(folder).rglob('*')) if file.suffix.lower() in get_img_extensions()]
    if len(files) < batch:
        raise ValueError(f'{folder} holds {len(files)} images, fewer than a batch of {batch}. Pass a folder of images.')
    _require('int8', ('PIL',))
    from PIL import Image

    data = resolve_model_data_config(model)
    transform: Any = create_transform(**dict(data, input_size=(3, *size)))

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(files) - batch + 1, batch):
            yield torch.stack([transform(Image.open(file).convert('RGB')) for file in files[first:first + batch]])

    return batches()


def _save_onnx(program: ExportedProgram, path: Path, output_names: Sequence[str]) -> None:
    """Write a program as ONNX, optimised: other tools look for weights where they are used, not behind transposes."""
    onnx_program: Any = torch.onnx.export(
        program, dynamo=True, input_names=['image'], output_names=output_names, verbose=False, optimize=True,
        opset_version=OPSET)
    model = onnx_program.model
    for node in model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    onnx_program.save(path)
    _name_dimensions(path)


def load_exported(path: Union[str, Path]) -> Callable[[Tensor], List[Tensor]]:
    """Load an exported file as a function from images of any precision to a list of outputs, all on the CPU.

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
        program = torch.export.load(path)
        placeholder = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
        like, module = placeholder.meta['val'], program.module()
        return lambda x: _as_list(module(x.to(like.device, like.dtype)))
    if format == 'onnx':
        session = importlib.import_module('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
        dtype = _DTYPES[session.get_inputs()[0].type]
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {'image': x.to('cpu', dtype).numpy()})]
    openvino = importlib.import_module('openvino')
    compiled = openvino.compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: [torch.from_numpy(y.copy()) for y in compiled(x.cpu().float().numpy()).to_tuple()]


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
        Largest difference of an output, over the root mean square of that output, for each of `probes`; NaN if either
        is NaN anywhere.
    """
    run = load_exported(path)
    parameter = _first_tensor(model)
    differences = {}
    for probe in probes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(probe[0], _channels(model), *probe[1:], generator=generator)
        with torch.no_grad(), evaluating(model):
            expected = _as_list(model(x.to(parameter.device, parameter.dtype)))
        differences[probe] = torch.stack([
            _difference(a.cpu().double(), b.cpu().double()) for a, b in zip(run(x), expected, strict=True)
        ]).max().item()  # not Python's, which loses NaN
    return differences


def _difference(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f'The file returns {list(a.shape)} where the model returns {list(b.shape)}: it is of another.')
    size = b.square().mean().sqrt()
    return (a - b).abs().max() / torch.where(size == 0, 1., size)


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


def _name_dimensions(path: Path) -> None:
    """Call open dimensions what they are, where PyTorch calls them s77."""
    onnx = importlib.import_module('onnx')
    model = onnx.load(path, load_external_data=False)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {dim.dim_param: name for dim, name in zip(dims, ('batch', 'channels', 'height', 'width'), strict=True)
             if dim.dim_param}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\w+', lambda match: names.get(match[0], match[0]), dim.dim_param)
    onnx.save(model, path)
