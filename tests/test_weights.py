"""weights/: the manifest agrees with the models, the registry and the files."""
import json
import re
from pathlib import Path

import pytest
import timm
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer  # noqa: F401
from timm_crossformer import hub
from timm_crossformer.crossformer import default_cfgs
from timm_crossformer.variants import VARIANTS

RECORDS = hub.manifest()
FIELDS = {
    'tag': str, 'origin': str, 'origin_url': (str, type(None)), 'hub': (str, type(None)), 'file': str,
    'bundled': (str, type(None)),
    'license': str, 'size': (int, type(None)), 'sha256': (str, type(None)), 'params': int, 'gmacs': float,
    'metrics': list, 'notes': str,
}


def ids(record):
    return record['tag']


@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_record_has_the_schema(record):
    assert set(FIELDS) <= set(record) <= {*FIELDS, 'cfg'}
    for name, kind in FIELDS.items():
        assert isinstance(record[name], kind), name
    assert record['sha256'] is None or re.fullmatch('[0-9a-f]{64}', record['sha256'])
    assert (record['origin_url'] or '').startswith('https://') or record['bundled']
    for metric in record['metrics']:
        assert set(metric) == {'name', 'value', 'dataset', 'source'}
        assert 0 < metric['value'] < 100 and metric['source']


def test_one_record_per_tag_with_weights():
    tags = [record['tag'] for record in RECORDS]
    assert len(set(tags)) == len(tags)
    pretrained = timm.list_pretrained('*crossformer*')
    assert sorted(tags) == sorted(name for name in pretrained if name.partition('.')[0] in VARIANTS)


@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_record_agrees_with_the_registry(record):
    cfg = timm.models.get_pretrained_cfg(record['tag'])
    if record['bundled']:
        assert Path(cfg.file) == hub.weights_dir() / record['bundled']
    else:
        assert cfg.hf_hub_id == record['hub'].replace('$NAMESPACE', hub.NAMESPACE)
        assert (cfg.hf_hub_filename or hub.WEIGHTS_NAME) == record['file']


@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_parameter_count(record):
    model = timm.create_model(record['tag'], device='meta')
    assert sum(p.numel() for p in model.parameters()) == record['params']


@pytest.mark.slow
@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_operations(record):
    import torch

    model = timm.create_model(record['tag']).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode(False), torch.no_grad():
        model(torch.zeros(1, *model.pretrained_cfg['input_size']))
    assert counter.get_total_flops() / 2e9 == pytest.approx(record['gmacs'], rel=1e-3)


def test_birder_hashes_and_sizes_are_those_of_birders_registry():
    pytest.importorskip('birder.net.crossformer')
    from birder.model_registry import registry

    records = [record for record in RECORDS if record['origin'] == 'birder']
    assert len(records) == 2
    for record in records:
        published = registry.get_pretrained_metadata(record['file'].removesuffix('.pt'))
        assert record['sha256'] == published['formats']['pt']['sha256']
        assert f'{published["formats"]["pt"]["file_size"]} MB' in record['notes']
        assert record['hub'] in published['url']
        size = timm.models.get_pretrained_cfg(record['tag']).input_size
        assert size[1:] == tuple(published['resolution'])


@pytest.mark.parametrize('record', [r for r in RECORDS if r['bundled']], ids=ids)
def test_bundled_file(record):
    path = hub.weights_dir() / record['bundled']
    assert path.stat().st_size == record['size'] and hub.sha256(path) == record['sha256']
    model = timm.create_model(record['tag'], pretrained=True)
    assert model.num_classes == record['cfg']['num_classes']


def test_a_bundled_file_becomes_a_tag_once_it_exists(tmp_path, monkeypatch):
    record = {'tag': 'test_crossformer.x', 'bundled': 'x.safetensors', 'cfg': {'num_classes': 10}}
    (tmp_path / 'manifest.json').write_text(json.dumps({'weights': [record]}))
    monkeypatch.setattr(hub, 'weights_dir', lambda: tmp_path)
    assert not list(hub.bundled_weights())
    (tmp_path / 'x.safetensors').write_bytes(b'')
    assert list(hub.bundled_weights()) == [('test_crossformer.x', str(tmp_path / 'x.safetensors'), {'num_classes': 10})]


def test_every_variant_has_a_cfg():
    assert set(default_cfgs) == set(VARIANTS)


def test_readme_gives_the_command_for_every_origin():
    readme = (hub.weights_dir() / 'README.md').read_text()
    for record in RECORDS:
        assert (record['origin_url'] or record['bundled']) in readme
        assert record['tag'].partition('.')[0] in readme
