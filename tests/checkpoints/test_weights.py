"""weights/: the manifest agrees with the models, the registry and the files."""
import json
import re
from pathlib import Path

import pytest
import timm
from torch.utils.flop_counter import FlopCounterMode

import timm_crossformer  # noqa: F401
from timm_crossformer.checkpoints import records
from timm_crossformer.checkpoints.files import hash_file
from timm_crossformer.config import per_stage
from timm_crossformer.crossformer import default_cfgs
from timm_crossformer.variants import VARIANTS

RECORDS = [record.to_json() for record in records.manifest()]
FIELDS = {
    'tag': str, 'origin': str, 'origin_url': (str, type(None)), 'sources': list, 'bundled': (str, type(None)),
    'dense': bool, 'license': str, 'digest': (str, type(None)), 'group_size': list, 'interval': list,
    'lda_grouping': str, 'params': int, 'gmacs': float, 'metrics': list, 'notes': str,
}
SOURCES = {
    'drive': {'id': r'[\w-]{33}'}, 'flowvision': {'name': r'crossformer_\w+_patch4_group7_224\.zip'},
    'hub': {'id': r'[\w-]+/[\w.-]+', 'file': r'[\w.-]+', 'revision': r'\w+'}, 'package': {'file': r'[\w.-]+'},
    'browser': {'url': r'https://pan\.baidu\.com/s/1[\w-]{22}', 'code': r'\w{4}'},
}


def ids(record):
    return record['tag']


@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_record_has_the_schema(record):
    assert set(FIELDS) <= set(record) <= {*FIELDS, 'cfg'}
    for name, kind in FIELDS.items():
        assert isinstance(record[name], kind), name
    assert record['digest'] is None or re.fullmatch('[0-9a-f]{64}', record['digest'])
    assert record['sources']
    for source in record['sources']:
        fields = SOURCES[source['kind']]
        hashes = set() if source['kind'] == 'browser' else {'sha256', 'size'}
        assert set(source) == {'kind', *fields, *hashes}
        assert all(re.fullmatch(pattern, source[name]) for name, pattern in fields.items()), source
        assert source.get('sha256') is None or re.fullmatch('[0-9a-f]{64}', source['sha256'])
        assert source.get('size') is None or source['size'] > 0
    assert (record['origin_url'] or '').startswith('https://') or record['bundled']
    for metric in record['metrics']:
        assert set(metric) == {'name', 'value', 'dataset', 'source'}
        assert 0 < metric['value'] < 100 and metric['source']


def test_records_are_the_manifest():
    manifest = json.loads((records.weights_dir() / 'manifest.json').read_text())
    assert manifest['weights'] == RECORDS


def test_one_record_per_tag_with_weights():
    tags = [record['tag'] for record in RECORDS]
    assert len(set(tags)) == len(tags)
    pretrained = timm.list_pretrained('*crossformer*')
    assert sorted(tags) == sorted(name for name in pretrained if name.partition('.')[0] in VARIANTS)


@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_record_agrees_with_the_registry(record):
    cfg = timm.models.get_pretrained_cfg(record['tag'])
    kinds = {source['kind']: source for source in record['sources']}
    if record['bundled']:
        assert Path(cfg.file) == records.weights_dir() / record['bundled'] and 'package' in kinds
    elif 'hub' in kinds:
        assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (kinds['hub']['id'], kinds['hub']['file'])
    else:
        assert cfg.hf_hub_id is None and cfg.url == f'timm-crossformer:{record["tag"]}'
        assert (cfg.num_classes == 0) == record['dense']
        assert ('drive' in kinds) == ('_pp_' not in record['tag']) and 'browser' in kinds


@pytest.mark.parametrize('record', RECORDS, ids=ids)
def test_groups_are_those_of_the_model(record):
    model = timm.create_model(record['tag'], device='meta')
    assert per_stage('g', model.group_size, 4) == record['group_size']
    assert per_stage('i', model.interval, 4) == record['interval']
    assert model.lda_grouping == record['lda_grouping']


def test_no_two_records_name_one_file():
    seen = [source.get('id') or source['url'] for record in RECORDS for source in record['sources']
            if source['kind'] in ('drive', 'browser') and 'huge' not in record['tag']]
    assert len(set(seen)) == len(seen)


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

    birders = [record for record in RECORDS if record['origin'] == 'birder']
    assert len(birders) == 2
    for record in birders:
        source, = record['sources']
        published = registry.get_pretrained_metadata(source['file'].removesuffix('.pt'))
        assert source['sha256'] == published['formats']['pt']['sha256']
        assert f'{published["formats"]["pt"]["file_size"]} MB' in record['notes']
        assert source['id'] in published['url']
        size = timm.models.get_pretrained_cfg(record['tag']).input_size
        assert size[1:] == tuple(published['resolution'])


@pytest.mark.parametrize('record', [r for r in RECORDS if r['bundled']], ids=ids)
def test_bundled_file(record):
    path = records.weights_dir() / record['bundled']
    source, = record['sources']
    assert path.stat().st_size == source['size'] and hash_file(path) == source['sha256']
    model = timm.create_model(record['tag'], pretrained=True)
    assert model.num_classes == record['cfg']['num_classes']


def test_a_bundled_file_becomes_a_tag_once_it_exists(tmp_path, monkeypatch):
    tag, cfg = 'test_crossformer.x', {'num_classes': 10}
    record = dict(RECORDS[0], tag=tag, bundled='x.safetensors', cfg=cfg)
    (tmp_path / 'manifest.json').write_text(json.dumps({'weights': [record]}))
    monkeypatch.setattr(records, 'weights_dir', lambda: tmp_path)
    assert not list(records.bundled_weights())
    (tmp_path / 'x.safetensors').write_bytes(b'')
    assert list(records.bundled_weights()) == [(tag, str(tmp_path / 'x.safetensors'), cfg)]


def test_every_variant_has_a_cfg():
    assert set(default_cfgs) == set(VARIANTS)


def test_readme_gives_the_command_for_every_origin():
    readme = (records.weights_dir() / 'README.md').read_text()
    for record in RECORDS:
        assert (record['origin_url'] or record['bundled']) in readme
        assert record['tag'].partition('.')[0] in readme
