from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]


@pytest.fixture(scope='module')
def detection(client):
    return client('torchvision').models.detection


class Pyramid(nn.Module):
    """What torchvision's detectors take for a backbone."""

    def __init__(self, channels=32):
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
        self.body = timm.create_model('test_crossformer', features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x):
        return self.fpn(OrderedDict(enumerate(self.body(x))))


def _detector(detection, name):
    anchors = detection.anchor_utils.AnchorGenerator(
        tuple((size,) for size in (8, 16, 32, 64, 128)), ((.5, 1., 2.),) * 5)
    args = dict(num_classes=3, min_size=61, max_size=131, size_divisible=1)
    if name == 'RetinaNet':
        return detection.RetinaNet(Pyramid(), anchor_generator=anchors, **args)
    roi_pool = _roi_align([0, 1, 2, 3], 7)
    if name == 'MaskRCNN':
        args['mask_roi_pool'] = _roi_align([0, 1, 2, 3], 14)
    return getattr(detection, name)(Pyramid(), rpn_anchor_generator=anchors, box_roi_pool=roi_pool, **args)


def _roi_align(names, size):
    from torchvision.ops import MultiScaleRoIAlign
    return MultiScaleRoIAlign(names, output_size=size, sampling_ratio=2)


def _batch():
    images = [torch.rand(3, 63, 97), torch.rand(3, 81, 70)]
    targets = []
    for image in images:
        box = torch.tensor([[5., 7., 41., 49.]])
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, 7:49, 5:41] = 1
        targets.append(dict(boxes=box, labels=torch.tensor([1]), masks=mask))
    return images, targets


@pytest.mark.parametrize('name', ['FasterRCNN', 'RetinaNet', 'MaskRCNN'])
def test_detector_trains_the_backbone_on_odd_sizes(detection, check_training, name):
    model = _detector(detection, name)
    images, targets = _batch()
    # RetinaNet starts with a nearly flat head, so only a tiny step is linear; with the others proposals jump.
    step = dict(decrease=1e-6) if name == 'RetinaNet' else dict(decrease=1e-2, rtol=.25)
    if name == 'RetinaNet':
        model.double()
        images = [image.double() for image in images]
        targets = [dict(target, boxes=target['boxes'].double()) for target in targets]
    check_training(lambda: sum(model(images, targets).values()), model.backbone.body, **step)


@pytest.mark.parametrize('name', ['FasterRCNN', 'RetinaNet', 'MaskRCNN'])
def test_detector_finds_boxes_inside_the_images(detection, name):
    model = _detector(detection, name).eval()
    if name == 'RetinaNet':
        model.score_thresh = 0.
    images, _ = _batch()
    with torch.no_grad():
        out = model(images)
    assert len(out) == 2
    for image, found in zip(images, out, strict=True):
        height, width = image.shape[1:]
        assert len(found['boxes']) > 0
        assert (found['boxes'] <= torch.tensor([width, height, width, height])).all()
        if name == 'MaskRCNN':
            assert found['masks'].shape[1:] == (1, height, width)
