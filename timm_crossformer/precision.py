"""ONNX files in half precision and in int8, made by onnxruntime's own tools from files in fp32."""
import importlib
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional

from torch import Tensor

# Sums of many terms, and exponents of scores: in fp32, with a cast on either side.
SAFE = ('LayerNormalization', 'Softmax', 'ReduceMean')
INT8 = ('Conv', 'Gemm', 'MatMul')


def to_half(path: Path, target: Path) -> None:
    """Write an ONNX file in half precision, for GPUs; images and outputs stay in fp32, as do norms and softmax."""
    onnx = importlib.import_module('onnx')
    float16 = importlib.import_module('onnxruntime.transformers.float16')
    model = float16.convert_float_to_float16(
        onnx.load(path), keep_io_types=True, op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *SAFE])
    # The conversion leaves casts behind their users, and what it had inferred from fp32: other runtimes refuse both.
    importlib.import_module('onnxruntime.transformers.onnx_model').OnnxModel(model).topological_sort()
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def to_int8(path: Path, target: Path, batches: Iterable[Tensor]) -> None:
    """Write an ONNX file whose linear layers and convolutions multiply in int8; attention stays in fp32.

    Args:
        path: File in fp32, of one image size.
        target: File to write.
        batches: Images [B, C, H, W] as the model gets them, by which the ranges of activations are found.

    Raises:
        ValueError: There are no images.
    """
    quantization = importlib.import_module('onnxruntime.quantization')
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / 'prepared.onnx'
        quantization.quant_pre_process(str(path), str(prepared))
        quantization.quantize_static(
            str(prepared), str(target), _reader(quantization, batches),
            quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=list(INT8), per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            reduce_range=True,  # 7 bits: processors without VNNI add pairs of products in 16 bits, which 8 overflow
            extra_options={'MatMulConstBOnly': True})


def _reader(quantization: Any, batches: Iterable[Tensor]) -> Any:
    feeds: Iterator[Dict[str, Any]] = ({'image': batch.numpy()} for batch in batches)
    first = next(feeds, None)
    if first is None:
        raise ValueError('There are no images to calibrate with. Pass a folder that holds some.')

    class Reader(quantization.CalibrationDataReader):
        waiting = first

        def get_next(self) -> Optional[Dict[str, Any]]:
            feed, self.waiting = self.waiting, None
            return feed or next(feeds, None)

    return Reader()
