"""Use a CrossFormer in Hugging Face transformers: as the backbone of RT-DETR, DETR or Mask2Former, and as a classifier.

    pip install timm_crossformer transformers
    python examples/transformers_timm.py                                  # RT-DETR
    python examples/transformers_timm.py --consumer Mask2Former
    python examples/transformers_timm.py --directory DIR --image examples/photo.jpg

Trains the consumer on one generated image and prints the loss before and after. With --directory, what
`timm-crossformer convert CHECKPOINT DIR` wrote is loaded by AutoModelForImageClassification instead, and the classes of
the image are printed.
"""
import argparse

import timm
import torch
from PIL import Image
from shapes import scene
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    TimmBackboneConfig,
)

import timm_crossformer  # noqa: F401  registers the models


def build(consumer, name):
    def backbone(*out_indices):
        return TimmBackboneConfig(backbone=name, out_indices=list(out_indices))

    channels = timm.create_model(name, features_only=True).feature_info.channels()
    if consumer == 'DETR':
        return DetrForObjectDetection(DetrConfig(
            backbone_config=backbone(1, 2, 3), d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128,
            decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10, num_labels=2))
    if consumer == 'RT-DETR':
        return RTDetrForObjectDetection(RTDetrConfig(
            backbone_config=backbone(1, 2, 3), encoder_in_channels=channels[1:], d_model=64, encoder_hidden_dim=64,
            encoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=128,
            decoder_layers=2, num_queries=20, num_labels=2, decoder_in_channels=[64, 64, 64]))
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=backbone(0, 1, 2, 3), hidden_dim=64, feature_size=64, mask_feature_size=64, encoder_layers=1,
        decoder_layers=2, num_attention_heads=4, num_queries=10, encoder_feedforward_dim=128, dim_feedforward=128,
        num_labels=2))


def targets(consumer, target, height, width):
    labels = target['labels'] - 1
    if consumer == 'Mask2Former':
        return dict(mask_labels=[target['masks'].float()], class_labels=[labels])
    x0, y0, x1, y1 = target['boxes'].unbind(1)
    boxes = torch.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], 1)
    return dict(labels=[dict(class_labels=labels, boxes=boxes)])


def classify(directory, path):
    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    inputs = AutoImageProcessor.from_pretrained(directory)(Image.open(path).convert('RGB'))
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1)[0]
    for score, index in zip(*scores.topk(min(5, len(scores))), strict=True):
        print(f'{score:.3f}  {model.config.id2label[index.item()]}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='test_crossformer', help='any CrossFormer')
    parser.add_argument('--consumer', default='RT-DETR', choices=['DETR', 'RT-DETR', 'Mask2Former'])
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--directory', help='converted weights to classify with')
    parser.add_argument('--image', default='examples/photo.jpg')
    args = parser.parse_args()
    if args.directory:
        classify(args.directory, args.image)
        return
    torch.manual_seed(0)
    height, width = 96, 128
    image, target = scene(height, width, torch.Generator().manual_seed(0))
    inputs = dict(pixel_values=image[None] * 2 - 1, **targets(args.consumer, target, height, width))
    model = build(args.consumer, args.backbone).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(args.steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f'{args.consumer} on {args.backbone}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {args.steps} steps')


if __name__ == '__main__':
    main()
