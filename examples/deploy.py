"""Classify an image with an exported file: NumPy, Pillow and ONNX Runtime, without PyTorch, timm or this package.

    timm-crossformer export model.onnx --model test_crossformer --pretrained --size 64
    python examples/deploy.py model.onnx examples/photo.jpg

What has to be done to the image is read from model.onnx.json, which the export writes beside the file.
"""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def prepare(image, steps):
    """Turn an RGB image into numbers [1, 3, height, width]."""
    if steps['crop_mode'] not in ('center', 'squash'):
        raise ValueError(f'This program knows the crop modes center and squash, got {steps["crop_mode"]}.')
    (height, width), (crop_h, crop_w) = steps['resize'], steps['crop']
    scale = max(height / image.height, width / image.width)  # covers both sides
    size = int(image.width * scale + 1e-6), int(image.height * scale + 1e-6)
    if steps['crop_mode'] == 'squash':
        size = width, height
    image = image.resize(size, getattr(Image.Resampling, steps['interpolation'].upper()))
    left, top = round((image.width - crop_w) / 2), round((image.height - crop_h) / 2)
    image = image.crop((left, top, left + crop_w, top + crop_h))
    pixels = np.asarray(image, np.float32) / 255
    pixels = (pixels - np.array(steps['mean'], np.float32)) / np.array(steps['std'], np.float32)
    return pixels.transpose(2, 0, 1)[None]


def main(path, photo):
    with open(f'{path}.json', encoding='utf-8') as file:
        about = json.load(file)
    pixels = prepare(Image.open(photo).convert('RGB'), about['preprocessing'])
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    logits = session.run(None, {about['input']['name']: pixels})[0][0]
    odds = np.exp(logits - logits.max())
    odds /= odds.sum()
    for index in np.argsort(-odds)[:5]:
        print(f'{odds[index]:6.1%}  {about["labels"][index] if about["labels"] else index}')


if __name__ == '__main__':
    main(*sys.argv[1:])
