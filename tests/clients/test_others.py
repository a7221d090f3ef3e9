import runpy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]


def test_effdet(client, check_training):
    factory = client('effdet.factory')
    config = client('effdet').get_efficientdet_config('efficientdet_d0')
    config.update(
        backbone_name='test_crossformer', backbone_indices=(1, 2, 3), backbone_args={}, image_size=(128, 192),
        num_classes=3, fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1)
    bench = factory.create_model_from_config(
        config, bench_task='train', pretrained_backbone=False, bench_labeler=True)
    images = torch.randn(2, 3, 128, 192)
    target = dict(bbox=[torch.tensor([[10., 10., 60., 60.]])] * 2, cls=[torch.tensor([1.])] * 2)
    # The class head starts flat, so only a small step is linear.
    bench.model.double()
    check_training(lambda: bench(images.double(), target)['loss'], bench.model.backbone, decrease=1e-6)
    predict = factory.create_model_from_config(config, bench_task='predict', pretrained_backbone=False).eval()
    with torch.no_grad():
        assert predict(images).shape == (2, 100, 6)


def test_fastai(client, check_training):
    vision = client('fastai.vision.all')
    images = [(torch.randn(3, 70, 101), i % 2) for i in range(8)]
    dls = vision.DataLoaders.from_dsets(images, images, bs=4, device='cpu')
    learner = vision.vision_learner(
        dls, 'test_crossformer', pretrained=False, n_out=2, loss_func=vision.CrossEntropyLossFlat(), normalize=False)
    body = learner.model[0]
    assert body.needs_pool
    assert body(torch.randn(2, 3, 70, 101)).shape == (2, 96, 3, 4)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    assert len(learner.recorder.losses) == 2
    # In double precision: to an untrained body images look alike, so the batch norm of the head multiplies rounding.
    model = learner.model.train().double()
    x, y = torch.randn(4, 3, 70, 101, dtype=torch.double), torch.tensor([0, 1, 0, 1])
    check_training(lambda: F.cross_entropy(model(x), y), body.model)


def test_anomalib_patchcore(client):
    model = client('anomalib.models.image.patchcore.torch_model').PatchcoreModel(
        layers=['stages.1', 'stages.2'], backbone='test_crossformer', pre_trained=False)
    normal = torch.rand(3, 3, 70, 101) * .1
    model.train()
    assert model(normal).shape == (3 * 9 * 13, 48 + 64)
    model.memory_bank = torch.cat(model.embedding_store)
    model.eval()
    odd = normal[:1].clone()
    odd[:, :, 20:50, 20:60] += 1
    seen, strange = model(normal[:1]), model(odd)
    assert seen.anomaly_map.shape == (1, 1, 70, 101)
    assert strange.pred_score > seen.pred_score


def test_anomalib_trains_the_backbone(client, check_training):
    extractor = client('anomalib.models.components').TimmFeatureExtractor(
        backbone='test_crossformer', layers=['stages.1', 'stages.2'], pre_trained=False, requires_grad=True)
    assert list(extractor.out_dims) == [48, 64]
    images = torch.randn(2, 3, 70, 101)
    check_training(
        lambda: sum(f.square().mean() for f in extractor(images).values()), extractor.feature_extractor)


def test_lightly_train_wraps_the_model(client, check_training):
    client('lightly_train')
    helpers = client('lightly_train._models.package_helpers')
    wrapper = helpers.get_wrapped_model('timm/test_crossformer', num_input_channels=3)
    images = torch.randn(2, 3, 70, 101)

    def pooled():
        return wrapper.forward_pool(wrapper.forward_features(images))['pooled_features']

    assert wrapper.feature_dim() == 96
    assert wrapper.forward_features(images)['features'].shape == (2, 96, 3, 4)
    assert pooled().shape == (2, 96, 1, 1)
    check_training(lambda: (pooled() - torch.arange(96).view(1, -1, 1, 1) / 96).square().mean(), wrapper.get_model(), (
        'head.fc',))


def test_lightly_train_pretrains(client, tmp_path):
    lightly_train = client('lightly_train')
    vision = client('torchvision')
    (tmp_path / 'images').mkdir()
    for i in range(4):
        vision.utils.save_image(torch.rand(3, 70, 101), tmp_path / 'images' / f'{i}.png')
    lightly_train.pretrain(
        out=tmp_path / 'out', data=tmp_path / 'images', model='timm/test_crossformer', method='simclr', epochs=1,
        batch_size=4, num_workers=0, accelerator='cpu', devices=1, precision='32-true',
        transform_args=dict(image_size=(64, 64)), embed_dim=None)
    state = torch.load(tmp_path / 'out' / 'exported_models' / 'exported_last.pt', weights_only=True)
    timm.create_model('test_crossformer').load_state_dict(state)


def test_torchgeo(client, check_training):
    trainers = client('torchgeo.trainers')
    segmentation = trainers.SemanticSegmentationTask(
        model='unet', backbone='tu-test_crossformer', weights=None, in_channels=5, num_classes=3)
    images, masks = torch.randn(2, 5, 70, 101), torch.randint(0, 3, (2, 70, 101))
    assert segmentation(images).shape == (2, 3, 70, 101)
    check_training(lambda: F.cross_entropy(segmentation(images), masks), segmentation.model.encoder.model)

    classification = trainers.ClassificationTask(
        model='test_crossformer', weights=None, in_channels=6, num_classes=3)
    images = torch.randn(2, 6, 70, 101)
    check_training(
        lambda: F.cross_entropy(classification(images), torch.tensor([0, 2])), classification.model)


def test_grad_cam_without_a_reshape(client):
    cam = client('pytorch_grad_cam')
    target = client('pytorch_grad_cam.utils.model_targets').ClassifierOutputTarget(3)
    model = timm.create_model('test_crossformer', pretrained=True).eval()
    images = torch.randn(2, 3, 75, 110)
    levels = []
    handle = model.stages[2].register_forward_hook(lambda module, args, out: levels.append(out))
    grads = torch.autograd.grad(model(images)[:, 3].sum(), levels)[0]
    handle.remove()
    expected = (grads.mean((2, 3), keepdim=True) * levels[0]).sum(1).relu().detach()
    with cam.GradCAM(model, target_layers=[model.stages[2]]) as extractor:
        heat = torch.from_numpy(extractor(images, [target, target]))
    assert heat.shape == (2, 75, 110)
    expected = F.interpolate(expected[:, None], size=(75, 110), mode='bilinear', align_corners=False)[:, 0]
    for ours, theirs in zip(heat, expected, strict=True):
        assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > .99


def test_the_example_of_class_activation_sees_a_cat(client, capsys, tmp_path):
    client('pytorch_grad_cam')
    path = Path(__file__).parents[2] / 'examples' / 'class_activation.py'
    heat = runpy.run_path(str(path))['main'](['--out', str(tmp_path / 'cam.jpg')])
    assert 'photo.jpg: cat' in capsys.readouterr().out and (tmp_path / 'cam.jpg').stat().st_size > 5000
    model = timm.create_model('test_crossformer', pretrained=True).eval()
    config = timm.data.resolve_data_config(
        {'input_size': (3, *heat.shape), 'crop_pct': 1., 'crop_mode': 'squash'}, model=model)
    photo = timm.data.create_transform(**config)(Image.open(path.with_name('photo.jpg')).convert('RGB'))
    order = torch.from_numpy(heat).flatten().argsort()

    def probability_without(pixels):
        blanked = photo.flatten(1).index_fill(1, pixels, 0.)
        with torch.no_grad():
            return model(blanked.view_as(photo)[None])[0].softmax(dim=0)[3]

    half = len(order) // 2
    assert probability_without(order[half:]) < .8 * probability_without(order[:half])  # the lit half, and the dark
