import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]


@pytest.fixture(scope='module')
def models(client):
    return client('mmpretrain.models')


def test_backbone_returns_the_last_map(models, check_training):
    backbone = models.TIMMBackbone('test_crossformer')
    images = torch.randn(2, 3, 70, 101)
    features, = backbone(images)
    assert features.shape == (2, 96, 3, 4)
    check_training(lambda: backbone(images)[0].pow(4).mean(), backbone)


def test_backbone_returns_the_pyramid(models):
    backbone = models.TIMMBackbone('test_crossformer', features_only=True, in_channels=4)
    maps = backbone(torch.randn(2, 4, 70, 101))
    assert [tuple(f.shape[1:]) for f in maps] == [(32, 18, 26), (48, 9, 13), (64, 5, 7), (96, 3, 4)]


def test_classifier_trains(models, check_training):
    model = models.ImageClassifier(
        backbone=dict(type='TIMMBackbone', model_name='test_crossformer'),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=96),
    )
    images, labels = torch.randn(2, 3, 70, 101), torch.tensor([0, 2])
    check_training(
        lambda: F.cross_entropy(model.head(model.extract_feat(images)), labels), model.backbone)
