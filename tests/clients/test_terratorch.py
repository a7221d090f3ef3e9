import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]


@pytest.fixture(scope='module')
def terratorch(client):
    return client('terratorch')


def test_registry_builds_the_backbone(terratorch, check_training):
    backbone = terratorch.BACKBONE_REGISTRY.build('timm_test_crossformer', pretrained=False, in_chans=5)
    images = torch.randn(2, 5, 70, 101)
    assert backbone.out_channels == [32, 48, 64, 96]
    assert [tuple(f.shape[1:]) for f in backbone(images)] == [(32, 18, 26), (48, 9, 13), (64, 5, 7), (96, 3, 4)]
    check_training(lambda: sum(f.square().mean() for f in backbone(images)), backbone)


@pytest.mark.parametrize('decoder, channels, size', [
    ('UNetDecoder', [32, 16, 16, 16], (64, 96)),
    ('UperNetDecoder', 32, (70, 101)),
])
def test_segmentation_with_six_channels(terratorch, check_training, decoder, channels, size):
    from terratorch.models import EncoderDecoderFactory
    model = EncoderDecoderFactory().build_model(
        task='segmentation', backbone='timm_test_crossformer', backbone_kwargs=dict(pretrained=False, in_chans=6),
        decoder=decoder, decoder_channels=channels, num_classes=3)
    images, masks = torch.randn(2, 6, *size), torch.randint(0, 3, (2, *size))
    assert model(images).output.shape == (2, 3, *size)
    model.double()
    check_training(lambda: F.cross_entropy(model(images.double()).output, masks), model.encoder, decrease=1e-6)
