import pytest
import timm
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]

# Decoder, sizes its own check and arithmetic let pass, arguments that keep it small.
DECODERS = {
    'Unet': ((70, 101), dict(decoder_channels=(32, 32, 16, 16, 8))),
    'UnetPlusPlus': ((64, 96), dict(decoder_channels=(32, 32, 16, 16, 8))),
    'MAnet': ((64, 96), dict(decoder_channels=(32, 32, 16, 16, 8))),
    'Linknet': ((64, 96), {}),
    'FPN': ((64, 96), dict(decoder_pyramid_channels=32, decoder_segmentation_channels=32)),
    'UPerNet': ((64, 96), dict(decoder_channels=32)),
    'Segformer': ((64, 96), dict(decoder_segmentation_channels=32)),
    'DPT': ((64, 96), dict(decoder_readout='ignore')),
    'PSPNet': ((64, 96), dict(psp_out_channels=32)),
}


@pytest.fixture(scope='module')
def smp(client):
    return client('segmentation_models_pytorch')


def _build(smp, decoder, **kwargs):
    args = dict(encoder_name='tu-test_crossformer', encoder_weights=None, classes=2)
    return getattr(smp, decoder)(**dict(args, **kwargs))


@pytest.mark.parametrize('decoder', DECODERS)
def test_decoders_train_the_backbone(smp, check_training, decoder):
    size, kwargs = DECODERS[decoder]
    model = _build(smp, decoder, **kwargs)
    images, masks = torch.randn(2, 3, *size), torch.randint(0, 2, (2, *size))
    assert model(images).shape == (2, 2, *size)
    unused = ('norm', 'head') if decoder == 'DPT' else ()  # DPT takes the whole model, for forward_intermediates
    # Small steps in double precision: decoders are full of ReLU, and some start with tiny gradients.
    model.double()
    check_training(lambda: F.cross_entropy(model(images.double()), masks), model.encoder.model, unused, decrease=1e-6)


def test_encoder_reports_the_pyramid(smp):
    encoder = _build(smp, 'Unet', encoder_name='tu-crossformer_tiny').encoder
    assert encoder.out_channels == [3, 0, 64, 128, 256, 512]
    assert encoder.model.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(f.shape) for f in encoder.eval()(torch.randn(1, 3, 256, 320))]
    assert shapes == [
        (1, 3, 256, 320), (1, 0, 128, 160), (1, 64, 64, 80), (1, 128, 32, 40), (1, 256, 16, 20), (1, 512, 8, 10)]


def test_shallow_encoder_with_four_channels(smp, check_training):
    model = _build(smp, 'Unet', in_channels=4, encoder_depth=3, decoder_channels=(32, 16, 8))
    images, masks = torch.randn(2, 4, 70, 101), torch.randint(0, 2, (2, 70, 101))
    assert model(images).shape == (2, 2, 70, 101)
    assert model.encoder.out_channels == [4, 0, 32, 48]
    check_training(lambda: F.cross_entropy(model(images), masks), model.encoder.model)


def test_save_and_load(smp, tmp_path):
    model = _build(smp, 'FPN', in_channels=4).eval()
    model.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 4, 64, 96)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_preprocessing_of_weights(smp):
    names = {name.split('.')[0] for name in timm.list_pretrained('*crossformer*')}
    assert names
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        params = smp.encoders.get_preprocessing_params(f'tu-{name}')
        assert params == dict(input_space='RGB', input_range=[0, 1], mean=list(cfg.mean), std=list(cfg.std))


@pytest.mark.parametrize('decoder', ['DeepLabV3Plus', 'PAN'])
def test_dilated_decoders_are_refused_by_name(smp, decoder):
    with pytest.raises(TypeError, match='output_stride'):
        _build(smp, decoder)


def test_script(smp):
    model = _build(smp, 'Unet').eval()
    images = torch.randn(1, 3, 70, 101)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
