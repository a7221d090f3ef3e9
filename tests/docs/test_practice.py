"""Every snippet of the page for practitioners runs as it stands, and does what its heading says."""
import ast
import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import use_fused_attn

PAGE = (Path(__file__).parents[2] / 'docs' / 'practice.md').read_text()
SECTIONS = {section.split('\n')[0]: re.findall(r'```python\n(.*?)```', section, re.DOTALL)
            for section in PAGE.split('\n## ')[1:]}
CLIENTS = {'accelerate', 'peft', 'pytorch_grad_cam', 'torchao'}  # the others come with the extra `test`
LONG = ('Export', 'Compile')
same = torch.testing.assert_close


def fresh(**kwargs):
    return timm.create_model('test_crossformer', pretrained=True, **kwargs).eval()


def packages(snippet):
    """List the packages that a snippet imports."""
    found = set()
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.split('.')[0] for name in found}


def changed(model, **kwargs):
    """Name the weights that are not those of the published model."""
    before = fresh(**kwargs).state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def check_layer_decay(model, optimizer, **_):
    rates = {id(p): group['lr'] * group.get('lr_scale', 1) for group in optimizer.param_groups for p in group['params']}
    assert rates[id(model.stem.convs[0].weight)] < rates[id(model.stages[2].blocks[1].mlp.fc1.weight)] < 1e-3
    assert rates[id(model.head.fc.weight)] == 1e-3
    assert changed(model, num_classes=3) >= {n for n, p in model.named_parameters() if 'mlp.fc1.weight' in n}


def check_frozen(model, trained, **_):
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {re.match(r'stages\.\d|\w+', name)[0] for name in frozen} == {'stem', 'stages.0', 'stages.1'}
    assert all(p.grad is not None for p in trained) and not any(p.grad is not None for p in model.stem.parameters())


def check_average(model, average, **_):
    same(average.module.head.fc.bias, model.head.fc.bias - .9)


def check_lora(adapted, merged, capsys, **_):
    with torch.no_grad():
        assert merged(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert not any('lora' in name for name, _ in merged.named_parameters())
    percent = float(re.search(r'trainable%: ([\d.]+)', capsys.readouterr().out)[1])
    assert 1 < percent < 20


def check_larger(model, image, logits, others, **_):
    same(logits, fresh()(image))
    assert others.shape == (1, 10) and (others - logits).abs().max() > 1e-3
    assert model.pretrained_cfg['input_size'] == (3, 64, 64) and model.group_size == 7


def check_channels(model, pyramid, **_):
    assert [tuple(level.shape) for level in pyramid] == [
        (1, 32, 25, 35), (1, 48, 13, 18), (1, 64, 7, 9), (1, 96, 4, 5)]
    conv, rgb = model.stem.convs[0].weight, fresh().stem.convs[0].weight
    same(conv, rgb[:, [0, 1, 2, 0]] * .75, rtol=1e-3, atol=1e-4)


def check_attention(short, long, row, column, **_):
    assert (row, column) == (18, 25)
    rows, columns = (short[0] > 0).nonzero().unbind(1)
    assert set(rows.tolist()) == set(range(16, 20)) and set(columns.tolist()) == set(range(24, 28))
    rows, columns = (long[0] > 0).nonzero().unbind(1)
    assert set(rows.tolist()) == set(range(2, 40, 4)) and set(columns.tolist()) == set(range(1, 60, 4))


def check_all_weights(weights, **_):
    assert use_fused_attn() and len(weights) == 10
    assert weights['stages.0.blocks.0.attn.attn_drop'].shape == (2 * 16, 1, 16, 16)


def check_cam(heat, **_):
    assert heat.shape == (1, 160, 240) and heat.min() >= 0 and 0.99 < heat.max() <= 1 and heat.std() > .05


def check_per_sample(model, grads, images, labels, **_):
    for i in range(3):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images[i:i + 1]), labels[i:i + 1]).backward()
        for name, p in model.named_parameters():
            same(grads[name][i], p.grad, rtol=1e-3, atol=1e-5)


def check_quantised(model, logits, **_):
    kinds = {type(m.weight).__name__ for m in model.modules() if type(m) is torch.nn.Linear}
    assert kinds == {'Int8Tensor'} and logits.shape == (1, 10)


def check_pruned(layers, **_):
    zeros = sum((layer.weight == 0).sum().item() for layer, _ in layers)
    assert zeros == pytest.approx(.5 * sum(layer.weight.numel() for layer, _ in layers), abs=1)
    assert all(type(layer.weight) is torch.nn.Parameter for layer, _ in layers)


def check_exported(logits, images, **_):
    same(torch.from_numpy(np.asarray(logits)) if not torch.is_tensor(logits) else logits, fresh()(images[0]),
         rtol=1e-3, atol=1e-3)


def check_offloaded(model, logits, images, **_):
    assert all(p.is_meta for p in model.parameters())
    same(logits, fresh()(images[0]), rtol=1e-4, atol=1e-5)


CHECKS = {
    'Fine-tune with layer decay': [check_layer_decay],
    'Freeze stages': [check_frozen],
    'Average weights (EMA)': [check_average],
    'LoRA (peft)': [check_lora],
    'Larger images after training': [check_larger],
    'Four channels': [check_channels],
    'Attention maps': [check_attention, check_all_weights],
    'Class activation maps (grad-cam)': [check_cam],
    'Per-sample gradients': [check_per_sample],
    'Quantise (torchao)': [check_quantised],
    'Prune': [check_pruned],
    'Export to ONNX (onnx, onnxruntime, onnxscript)': [check_exported],
    'Export with torch.export': [check_exported],
    'Compile ahead of time with AOTInductor': [check_exported],
    'Export to OpenVINO (openvino)': [check_exported],
    'Offload (accelerate)': [check_offloaded],
}


def cases():
    for title, snippets in SECTIONS.items():
        for i, (snippet, check) in enumerate(zip(snippets, CHECKS[title], strict=True)):
            marks = [pytest.mark.filterwarnings('ignore:There is a performance drop')]  # in vmap
            if packages(snippet) & CLIENTS:
                marks = [pytest.mark.clients, pytest.mark.filterwarnings('default')]
            if title.startswith(LONG):
                marks.append(pytest.mark.slow)
            yield pytest.param(snippet, check, marks=marks, id=title + ', again' * i)


def test_every_section_is_checked():
    assert set(SECTIONS) == set(CHECKS)


def test_a_snippet_has_ten_lines_at_most():
    assert max(len(list(filter(None, s.splitlines()))) for snippets in SECTIONS.values() for s in snippets) <= 10


@pytest.mark.parametrize('snippet, check', list(cases()))
def test_snippet(snippet, check, tmp_path, monkeypatch, capsys):
    for name in sorted(packages(snippet) & CLIENTS):
        if not os.environ.get('REQUIRE_CLIENTS'):
            pytest.importorskip(name)
        importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    images = []  # what the snippet draws, for checks that compute the result again
    draw = torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *shape: images.append(draw(*shape)) or images[-1])
    scope = {}
    exec(compile(snippet, 'practice.md', 'exec'), scope)
    monkeypatch.undo()
    with torch.no_grad() if check is not check_per_sample else torch.enable_grad():
        check(**{'capsys': capsys, 'images': images, **scope})
