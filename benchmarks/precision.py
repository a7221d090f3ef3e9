"""Measure how far lower precision moves the outputs, relative to float32.

    python benchmarks/precision.py                                 # two models on every device there is
    python benchmarks/precision.py --models test_crossformer.cifar10 --pretrained

Images are crops of a photograph. Without --pretrained every layer gets random weights that keep the scale of its
input, so that each one, position biases included, moves the output. Rows go to results/precision-<torch>-<device>.csv.
"""
import argparse
import copy
import csv
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import timm_crossformer  # noqa: F401  registers the models

ROOT = Path(__file__).parent
COLUMNS = ['model', 'weights', 'size', 'images', 'precision', 'stage1', 'stage2', 'stage3', 'stage4', 'logits', 'top1']


def randomize(model: nn.Module) -> None:
    """Draw weights that keep the scale of what passes through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(noise * .1 + name.endswith('weight'))
            else:
                p.copy_(noise if 'pos_bias' in name else noise * p[0].numel() ** -.5)


def crops(path: Path, size: int, count: int, mean: Any, std: Any) -> Tensor:
    """Cut `count` squares from a photograph at several scales, and normalise them."""
    image = Image.open(path).convert('RGB')
    random = np.random.RandomState(0)
    batch = []
    for _ in range(count):
        side = random.randint(min(image.size) // 3, min(image.size) + 1)
        left, top = random.randint(image.width - side + 1), random.randint(image.height - side + 1)
        crop = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        batch.append(np.asarray(crop, np.float32) / 255)
    pixels = (np.stack(batch) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def quantize_ao(model: nn.Module) -> Optional[nn.Module]:
    """Swap every Linear for a dynamic int8 one of torch.ao."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch.ao announces its end
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as e:
        print(f'int8 by torch.ao: not available ({e})')
        return None


def quantize_torchao(model: nn.Module) -> Optional[nn.Module]:
    """Give every Linear int8 weights and dynamic int8 activations of torchao."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as e:
        print(f'int8 by torchao: not available ({e})')
        return None
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def precisions(device: str) -> Dict[str, Callable[[nn.Module, Tensor], Any]]:
    """Map a name to a function of a model and images that returns outputs, or None where it is not available."""
    def autocast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], Any]:
        def run(model: nn.Module, images: Tensor) -> Any:
            with torch.autocast(device, dtype):
                return outputs(model, images)
        return run

    def cast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], Any]:
        return lambda model, images: outputs(model.to(dtype), images.to(dtype))

    def quantized(quantize: Callable[[nn.Module], Optional[nn.Module]]) -> Callable[[nn.Module, Tensor], Any]:
        def run(model: nn.Module, images: Tensor) -> Any:
            swapped = quantize(model)
            return None if swapped is None else outputs(swapped, images)
        return run

    found = {
        'autocast bf16': autocast(torch.bfloat16),
        'autocast fp16': autocast(torch.float16),
        'bf16': cast(torch.bfloat16),
        'fp16': cast(torch.float16),
        'int8 linears (torchao)': quantized(quantize_torchao),
    }
    if device == 'cpu':
        found['int8 linears (torch.ao)'] = quantized(quantize_ao)
    return found


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> List[Tensor]:
    """Return the maps of the stages and the logits, in float32."""
    features, stages = model.forward_intermediates(images)
    return [x.float() for x in (*stages, model.forward_head(features))]


def relative(x: Tensor, reference: Tensor) -> float:
    """Return the L2 distance over the L2 norm of the reference."""
    return ((x - reference).norm() / reference.norm()).item()


def measure(name: str, pretrained: bool, device: str, photo: Path, count: int) -> List[Dict[str, Any]]:
    """Compare a model in every precision with itself in float32."""
    model = timm.create_model(name, pretrained=pretrained).eval()
    if not pretrained:
        randomize(model)
    config = resolve_model_data_config(model)
    size = config['input_size'][-1]
    images = crops(photo, size, count, config['mean'], config['std']).to(device)
    reference = outputs(model.to(device), images)
    rows = []
    for precision, run in precisions(device).items():
        low = run(copy.deepcopy(model), images)
        if low is None:
            continue
        errors = [relative(x, y) for x, y in zip(low, reference, strict=True)]
        agree = (low[-1].argmax(1) == reference[-1].argmax(1)).float().mean().item()
        values = [f'{error:.2e}' for error in errors] + [f'{agree:.3f}']
        weights = 'trained' if pretrained else 'random'
        rows.append(dict(zip(COLUMNS, [name, weights, size, count, precision, *values], strict=True)))
        print('  '.join(f'{value!s:>{width}}' for value, width in zip(
            rows[-1].values(), (18, 8, 4, 3, 24, 9, 9, 9, 9, 9, 6), strict=True)), flush=True)
    return rows


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['crossformer_tiny', 'crossformer_pp_small'])
    parser.add_argument('--pretrained', action='store_true', help='load weights')
    parser.add_argument('--photo', type=Path, default=ROOT.parent / 'examples' / 'photo.jpg')
    parser.add_argument('--images', type=int, default=16, help='number of crops')
    parser.add_argument('--results', type=Path, default=ROOT / 'results', help='folder of the CSV files')
    args = parser.parse_args()
    print('Relative L2 error of the four maps and the logits, and share of equal first classes.')
    for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
        rows = [row for name in args.models for row in measure(name, args.pretrained, device, args.photo, args.images)]
        hardware = 'cpu' if device == 'cpu' else torch.cuda.get_device_name().lower().replace(' ', '_')
        path = args.results / f'precision-{torch.__version__.split("+")[0]}-{hardware}.csv'
        with open(path, 'w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        print(f'wrote {path}')


if __name__ == '__main__':
    main()
