import pytest
import timm
import torch

from timm_crossformer.checkpoints.writing import convert_file
from timm_crossformer.model import CrossFormerFeatures

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings('default'),  # other packages warn of each other
]

LABELS = [dict(class_labels=torch.tensor([1, 2]), boxes=torch.tensor([[.5, .5, .4, .3], [.3, .4, .2, .2]]))]


@pytest.fixture(scope='module')
def hf(client):
    return client('transformers')


def _backbone_config(hf, out_indices=(1, 2, 3)):
    return hf.TimmBackboneConfig(backbone='test_crossformer', out_indices=list(out_indices))


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2, 3), (3,), None], ids=str)
def test_backbone(hf, out_indices):
    config = hf.TimmBackboneConfig(backbone='test_crossformer', out_indices=out_indices and list(out_indices))
    model = hf.AutoBackbone.from_config(config).eval()
    wanted = out_indices or (3,)
    assert model.stage_names == ['stages.0', 'stages.1', 'stages.2', 'stages.3']
    assert model.channels == [(32, 48, 64, 96)[i] for i in wanted]
    image = torch.randn(1, 3, 70, 101)
    plain = model(image).feature_maps
    out = model(image, output_hidden_states=True)
    shapes = [(1, 32, 18, 26), (1, 48, 9, 13), (1, 64, 5, 7), (1, 96, 3, 4)]
    assert [tuple(state.shape) for state in out.hidden_states] == shapes
    assert [tuple(state.shape) for state in plain] == [shapes[i] for i in wanted]
    for maps in (out.feature_maps, model(image).feature_maps):  # the second: nothing of hidden states stays behind
        torch.testing.assert_close(maps, plain, rtol=0, atol=0)


def test_backbone_saves_and_loads(hf, tmp_path):
    model = hf.TimmBackbone(_backbone_config(hf)).eval()
    model.save_pretrained(tmp_path)
    state = timm.models.load_state_dict(str(tmp_path / 'model.safetensors'))
    loaded = hf.TimmBackbone(hf.TimmBackboneConfig.from_pretrained(tmp_path)).eval()
    loaded.load_state_dict(state)
    image = torch.randn(1, 3, 70, 101)
    torch.testing.assert_close(loaded(image).feature_maps, model(image).feature_maps, rtol=0, atol=0)


def _detr(hf):
    return hf.DetrForObjectDetection(hf.DetrConfig(
        backbone_config=_backbone_config(hf), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=8, num_labels=3))


def _rt_detr(hf):
    return hf.RTDetrForObjectDetection(hf.RTDetrConfig(
        backbone_config=_backbone_config(hf), encoder_in_channels=[48, 64, 96], d_model=32, encoder_hidden_dim=32,
        encoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32,
        decoder_layers=2, num_queries=20, num_labels=3, decoder_in_channels=[32, 32, 32], num_denoising=4))


def _mask2former(hf):
    return hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(
        backbone_config=_backbone_config(hf, range(4)), hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8, encoder_feedforward_dim=32,
        dim_feedforward=32, num_labels=3))


def _upernet(hf):
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(
        backbone_config=_backbone_config(hf, range(4)), hidden_size=32, num_labels=3, auxiliary_in_channels=64,
        auxiliary_channels=16))


CONSUMERS = {
    'DETR': (_detr, (1, 3, 70, 101), dict(labels=LABELS)),
    'RT-DETR': (_rt_detr, (1, 3, 96, 128), dict(labels=LABELS)),
    'Mask2Former': (_mask2former, (1, 3, 96, 128), dict(
        mask_labels=[torch.ones(1, 96, 128)], class_labels=[torch.tensor([1])])),
    'UPerNet': (_upernet, (2, 3, 70, 101), dict(labels=torch.ones(2, 70, 101, dtype=torch.long))),
}


@pytest.mark.parametrize('name', CONSUMERS)
def test_detectors_and_segmenters_train_the_backbone(hf, check_training, name):
    build, shape, targets = CONSUMERS[name]
    model = build(hf).train()
    backbone = next(m for m in model.modules() if isinstance(m, CrossFormerFeatures))
    image = torch.randn(shape)
    # Targets are matched to queries anew at each step: only a small one keeps the match. RT-DETR also takes the
    # best of all positions for queries, and weighs its loss by an overlap that it holds constant; Mask2Former samples
    # the points that are least certain.
    decrease = None if name in ('RT-DETR', 'Mask2Former') else 2e-5
    check_training(lambda: model(pixel_values=image, **targets).loss, backbone, decrease=decrease)


@pytest.mark.parametrize('name', ['RT-DETR', 'Mask2Former'])
def test_detectors_and_segmenters_learn(hf, name):
    build, shape, targets = CONSUMERS[name]
    model = build(hf).train()
    image = torch.randn(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(pixel_values=image, **targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < .9 * sum(losses[:3])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model, and a directory that `timm-crossformer convert` wrote of its weights."""
    torch.manual_seed(0)
    model = timm.create_model('crossformer_tiny', num_classes=5, group_size=(4, 4, 7, 7)).eval()
    root = tmp_path_factory.mktemp('convert')
    torch.save(model.state_dict(), root / 'weights.pth')
    convert_file(root / 'weights.pth', root / 'model', model='crossformer_tiny', groups={'group_size': (4, 4, 7, 7)})
    return model, root / 'model'


def test_wrapper_classifies(hf, saved):
    model, path = saved
    wrapper = hf.AutoModelForImageClassification.from_pretrained(path).eval()
    image = torch.randn(1, 3, 70, 101)
    torch.testing.assert_close(wrapper(image).logits, model(image), rtol=1e-5, atol=1e-6)
    processor = hf.AutoImageProcessor.from_pretrained(path)
    assert processor.data_config['input_size'] == (3, 224, 224)


def test_wrapper_returns_hidden_states(hf, saved):
    model, path = saved
    wrapper = hf.AutoModel.from_pretrained(path).eval()
    image = torch.randn(1, 3, 70, 101)
    out = wrapper(image, output_hidden_states=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [
        (1, 64, 18, 26), (1, 128, 9, 13), (1, 256, 5, 7), (1, 512, 3, 4)]
    torch.testing.assert_close(out.last_hidden_state, model.forward_features(image), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out.pooler_output, model.forward_head(out.last_hidden_state, pre_logits=True), rtol=1e-5, atol=1e-6)
    some = wrapper(image, output_hidden_states=[1, 2, 3]).hidden_states
    torch.testing.assert_close(some, list(out.hidden_states[1:]), rtol=0, atol=0)


def test_wrapper_takes_other_classes_and_trains(hf, saved, check_training):
    _, path = saved
    wrapper = hf.AutoModelForImageClassification.from_pretrained(path, num_labels=2, ignore_mismatched_sizes=True)
    wrapper.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in wrapper.timm_model.stages)
    images, labels = torch.randn(2, 3, 70, 101), torch.tensor([0, 1])
    check_training(lambda: wrapper.train()(images, labels=labels).loss, wrapper.timm_model)


def test_wrapper_saves_and_loads(hf, saved, tmp_path):
    model, path = saved
    hf.AutoModelForImageClassification.from_pretrained(path).save_pretrained(tmp_path)
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 70, 101)
    torch.testing.assert_close(loaded(image).logits, model(image), rtol=1e-5, atol=1e-6)
