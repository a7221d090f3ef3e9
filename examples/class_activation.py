"""Draw where on a photo a class is seen: Grad-CAM over the last map, which is NCHW and needs no reshape.

Needs the package grad-cam: `pip install grad-cam`.
"""
import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import timm_crossformer  # noqa: F401  registers the models

PHOTO = Path(__file__).parent / 'photo.jpg'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--image', type=Path, default=PHOTO)
    parser.add_argument('--model', default='test_crossformer', help='with weights, as for timm.create_model')
    parser.add_argument('--size', type=int, nargs=2, default=(160, 240), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--out', type=Path, default=Path('outputs/class_activation.jpg'))
    args = parser.parse_args(argv)

    model = timm.create_model(args.model, pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    config.update(input_size=(3, *args.size), crop_pct=1., crop_mode='squash')
    image = timm.data.create_transform(**config)(Image.open(args.image).convert('RGB'))
    with torch.no_grad():
        scores = model(image[None])[0].softmax(dim=0)
    names = model.pretrained_cfg['label_names'] or range(len(scores))
    best = int(scores.argmax())
    print(f'{args.image.name}: {names[best]}, {scores[best]:.0%}')

    with GradCAM(model, target_layers=[model.stages[-1]]) as cam:
        heat = cam(image[None], [ClassifierOutputTarget(best)])[0]  # height, width, in 0..1
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    photo = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    both = show_cam_on_image(photo, heat, use_rgb=True)
    Image.fromarray(both).resize((2 * args.size[1], 2 * args.size[0]), Image.Resampling.BICUBIC).save(args.out)
    print(f'wrote {args.out}')
    return heat


if __name__ == '__main__':
    main()
