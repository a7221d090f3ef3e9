"""Published weights by name, from hosts on the loopback address that behave as the real ones do."""
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import traceback

import huggingface_hub
import pytest
import timm
import torch
from common import official_keys
from host_server import HostServer
from hub_server import HubServer, ask_here
from test_reading import write_oneflow

from timm_crossformer import cli
from timm_crossformer.checkpoints import records, store, writing
from timm_crossformer.checkpoints import transfer as download
from timm_crossformer.checkpoints.errors import CheckpointError, FetchError
from timm_crossformer.checkpoints.verifying import verify_directory

TINY = 'crossformer_tiny.in1k'
FPN = 'crossformer_small.semantic_fpn_ade20k'


def source_of(tag, kind='drive'):
    return next(source for source in records.find(tag).sources if source.kind == kind)


def drive_id(tag):
    return source_of(tag).id


def weights(entry, seed=0):
    """Synthetic official weights in half precision, for speed."""
    generator = torch.Generator().manual_seed(seed)
    return {key: (torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1 and key.endswith('weight'))).half()
            for key, shape in official_keys()[entry].items()}


@pytest.fixture(scope='module')
def tiny():
    return weights('cls-crossformer_tiny')


@pytest.fixture(scope='module')
def files(tmp_path_factory, tiny):
    """The bytes of every file a host may have."""
    root = tmp_path_factory.mktemp('files')
    made = {}

    def save(name, value):
        torch.save(value, root / name)
        made[name] = (root / name).read_bytes()

    save('tiny', {'model': tiny, 'epoch': 299})
    save('other', {'model': {**tiny, 'norm.bias': tiny['norm.bias'] + 1}})
    save('small', {'model': weights('cls-crossformer_small')})
    save('fpn', {'state_dict': {f'backbone.{k}': t for k, t in weights('det-crossformer_small').items()}, 'meta': {}})
    save('nan', {'model': {**tiny, 'norm.bias': tiny['norm.bias'] * float('nan')}})
    save('classes', {'model': {**tiny, 'head.weight': tiny['head.weight'][:10], 'head.bias': tiny['head.bias'][:10]}})
    save('backbone', {'state_dict': {k: t for k, t in tiny.items() if not k.startswith(('norm.', 'head.'))}})
    made['hostile'] = pickle.dumps({'model': Hostile()})
    made['text'] = b'<html><title>gone</title></html>'
    made['cut'] = made['tiny'][:len(made['tiny']) // 2]
    for form in ('legacy', 'pickled'):
        arrays = {key: t.numpy() for key, t in tiny.items()}
        path = write_oneflow(root / f'{form}.zip', arrays, form, 'crossformer_tiny_patch4_group7_224')
        made[form] = path.read_bytes()
    return made


class Hostile:
    def __reduce__(self):
        return os.system, ('touch pwned',)


@pytest.fixture
def host(tmp_path, monkeypatch, files):
    monkeypatch.setattr(download, 'WAIT', 0.001)
    monkeypatch.delenv('TIMM_CROSSFORMER_HUB', raising=False)
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)

    def no_account(*args, **kwargs):
        raise AssertionError('asked an account')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', no_account)
    with HostServer() as server:
        for name, value in server.environment(tmp_path / 'store').items():
            monkeypatch.setenv(name, value)
        server.files = {drive_id(TINY): files['tiny'], drive_id(FPN): files['fpn'],
                        source_of(TINY, 'flowvision').name: files['legacy']}
        yield server


def equal(model, tiny):
    named = model.state_dict()
    return torch.equal(named['norm.weight'], tiny['norm.weight'].float()) and torch.equal(
        named['stages.3.blocks.5.mlp.fc2.weight'], tiny['layers.3.blocks.5.mlp.fc2.weight'].float())


def left(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob('*')) if path.exists() else []


def test_fetches_once_then_needs_nobody(host, tiny, tmp_path, monkeypatch):
    model = timm.create_model(TINY, pretrained=True)
    assert equal(model, tiny) and model.pretrained_cfg['file'].endswith(f'{TINY}/model.safetensors')
    assert len(host.requests) == 1 and host.requests[0].startswith('/drive?')
    assert equal(timm.create_model('crossformer_tiny', pretrained=True), tiny) and len(host.requests) == 1
    assert left(tmp_path / 'store') == [TINY, *(f'{TINY}/{name}' for name in (
        'README.md', 'config.json', 'model.safetensors'))]
    facts = json.loads((tmp_path / 'store' / TINY / 'config.json').read_text())['timm_crossformer']
    assert facts['fetched_from'] == 'drive' and drive_id(TINY) in facts['address']
    assert facts['source_size'] == len(host.files[drive_id(TINY)]) and re.fullmatch('[0-9a-f]{64}', facts['digest'])
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', facts['date'])
    host.files.clear()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert equal(timm.create_model(TINY, pretrained=True), tiny) and len(host.requests) == 1
    directory = tmp_path / 'store' / TINY
    assert equal(timm.create_model(f'local-dir:{directory}', pretrained=True), tiny)
    assert {c.check: c.ok for c in verify_directory(directory)}['sha256']


def test_warnings_pages_and_cut_transfers_are_overcome(host, tiny):
    host.warned.add(drive_id(TINY))
    host.faults[drive_id(TINY)] = ['', 'cut', '', '503']
    assert equal(timm.create_model(TINY, pretrained=True), tiny)


@pytest.mark.parametrize('change', [
    dict(features_only=True), dict(num_classes=7), dict(num_classes=0), dict(in_chans=1), dict(global_pool='max'),
    dict(pretrained_cfg_overlay=dict(crop_pct=0.9)), dict(features_only=True, out_indices=(1, 2), in_chans=2),
], ids=str)
def test_what_timm_changes_is_changed(host, tiny, change, tmp_path):
    change = dict(change, cache_dir=str(tmp_path / 'elsewhere'))
    model = timm.create_model(TINY, pretrained=True, **change).eval()
    stage = model.stages_1 if change.get('features_only') else model.stages[1]
    assert torch.equal(stage.blocks[0].mlp.fc1.bias, tiny['layers.1.blocks.0.mlp.fc1.bias'].float())
    assert left(tmp_path / 'elsewhere')[0] == TINY and not (tmp_path / 'store').exists()
    if 'num_classes' in change:
        assert model.num_classes == change['num_classes']
    if 'pretrained_cfg_overlay' in change:
        assert model.pretrained_cfg['crop_pct'] == 0.9
    out = model(torch.rand(1, change.get('in_chans', 3), 64, 64))
    assert all(torch.isfinite(level).all() for level in (out if isinstance(out, list) else [out]))


def test_an_overlay_that_names_other_weights_wins(host, files, tiny, tmp_path):
    (tmp_path / 'other.pth').write_bytes(files['other'])
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'other.pth')))
    assert torch.equal(model.norm.bias, (tiny['norm.bias'] + 1).float()) and not host.requests


@pytest.mark.parametrize('form', ['legacy', 'pickled'])
@pytest.mark.parametrize('fault', ['quota', 'denied', 'unknown', '404', 'hostile', 'small', 'text', 'cut', 'nan'])
def test_the_next_host_is_asked(host, files, tiny, fault, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    host.files[source_of(TINY, 'flowvision').name] = files[form]
    if fault in files:
        host.files[drive_id(TINY)] = files[fault]
    else:
        host.faults[drive_id(TINY)] = [fault]
    assert equal(timm.create_model(TINY, pretrained=True), tiny)
    assert [r.split('?')[0].split('/')[1] for r in host.requests] == ['drive', 'flowvision']
    assert store.stored(TINY).fetched_from == 'flowvision'
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('fault, message', [
    ('quota', 'quota of this file is used up'), ('404', 'not there any more'), ('unknown', 'Something new'),
    ('hostile', 'asks to import posix.system. Nothing in it was run'), ('small', 'try crossformer_small'),
    ('text', 'page came instead of a file'), ('cut', 'no intact checkpoint'), ('nan', 'finite values'),
    ('classes', 'num_classes=10 instead of 1000'), ('backbone', 'stands for a classifier'),
])
def test_failures_are_one_message_and_leave_nothing(host, files, fault, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    del host.files[source_of(TINY, 'flowvision').name]
    refused = fault in ('hostile', 'small', 'cut', 'nan', 'classes', 'backbone')
    if fault in files:
        host.files[drive_id(TINY)] = files[fault]
    else:
        host.faults[drive_id(TINY)] = [fault] * 9
    with pytest.raises(CheckpointError if refused else FetchError) as e:
        timm.create_model(TINY, pretrained=True)
    told = str(e.value)
    assert message in told and 'flowvision: 127.0.0.1' in told and '404' in told
    for line in (f'  https://drive.google.com/file/d/{drive_id(TINY)}/view',
                 '  https://pan.baidu.com/s/1M45YXZgVvp6Ew9DO8UhdlA   # code nkju',
                 f'  timm-crossformer fetch {TINY} --from FILE'):
        assert f'{line}\n' in f'{told}\n'
    assert left(tmp_path) == []
    assert cli.main(['fetch', TINY]) == (cli.REFUSED if refused else cli.NETWORK)
    assert message in capsys.readouterr().err and left(tmp_path) == []


def test_weights_for_the_browser_only(host, files, tmp_path, capsys):
    for tag, code in (('crossformer_pp_small.in1k', '1smc_kRoogd0Ig5vfqwuGTA   # code crsf'),
                      ('crossformer_pp_huge.in1k', '1xtPh-ndcOxRM7fPYYxIIRg   # code crsf')):
        with pytest.raises(FetchError, match=rf'(?s){re.escape(code)}.*fetch {tag} --from FILE') as e:
            timm.create_model(tag, pretrained=True)
        assert ('that of large' in str(e.value)) == ('huge' in tag)
    assert not host.requests and left(tmp_path) == []
    assert cli.main(['fetch', 'crossformer_pp_small', '--source', 'drive']) == cli.REFUSED
    assert 'can be fetched from no host' in capsys.readouterr().err
    with pytest.raises(ValueError, match='no host'):
        store.fetch('crossformer_pp_small.in1k', source='drive')


def test_offline_means_no_request_at_all(host, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError('asked the network')

    monkeypatch.setattr(download, '_ask', refuse)
    for offline in ('environment', 'constant'):
        with monkeypatch.context() as patch:
            if offline == 'environment':
                patch.setenv('HF_HUB_OFFLINE', '1')
            else:
                patch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
            patch.setenv('TIMM_CROSSFORMER_HUB', 'someone')
            with pytest.raises(FetchError, match='HF_HUB_OFFLINE is set, so nothing was asked'):
                timm.create_model(TINY, pretrained=True)
            with pytest.raises(FetchError, match='HF_HUB_OFFLINE'):
                store.cross_check(TINY)
    assert left(tmp_path) == []


def test_first_weights_are_trusted_others_are_an_error(host, files, tiny, tmp_path, capsys):
    first = store.fetch(TINY).conversion.digest
    assert store.fetch(TINY, source='flowvision', force=True).conversion.digest == first
    host.files[drive_id(TINY)] = files['other']
    with pytest.raises(CheckpointError) as e:
        store.fetch(TINY, force=True, source='drive')
    now = str(e.value)
    assert first in now and 'from flowvision on 20' in now and len(set(re.findall('[0-9a-f]{64}', now))) == 2
    with pytest.raises(CheckpointError, match='other weights than are known'):
        store.fetch(TINY, force=True)  # the second host is not asked to smooth it over
    assert equal(timm.create_model(TINY, pretrained=True), tiny)
    (tmp_path / 'store' / TINY / 'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='other weights than are known'):
        timm.create_model(TINY, pretrained=True)
    (tmp_path / 'x.pth').write_bytes(files['other'])
    assert cli.main(['fetch', TINY, '--from', str(tmp_path / 'x.pth')]) == cli.REFUSED
    assert 'file gives other weights' in capsys.readouterr().err
    (tmp_path / 'x.pth').write_bytes(files['pickled'])
    assert cli.main(['fetch', TINY, '--from', str(tmp_path / 'x.pth')]) == cli.OK
    assert equal(timm.create_model(TINY, pretrained=True), tiny)


def test_a_digest_in_the_manifest_is_held_to(host, monkeypatch, tmp_path):
    changed = dataclasses.replace(records.find(TINY), digest='0' * 64)
    monkeypatch.setattr(store, 'find', lambda tag: changed)
    with pytest.raises(CheckpointError, match='from the manifest'):
        timm.create_model(TINY, pretrained=True)
    assert left(tmp_path) == []


def test_a_hash_in_the_manifest_is_held_to(host, tiny, monkeypatch):
    record = records.find(TINY)
    sources = (dataclasses.replace(record.sources[0], sha256='0' * 64), *record.sources[1:])
    monkeypatch.setattr(store, 'find', lambda tag: dataclasses.replace(record, sources=sources))
    assert equal(timm.create_model(TINY, pretrained=True), tiny)
    assert store.stored(TINY).fetched_from == 'flowvision'


def test_cross_check(host, files, capsys, tmp_path):
    faults = host.faults[drive_id(TINY)] = ['quota']
    with pytest.raises(FetchError, match=r'drive: 127\.0\.0\.1.*quota'):
        store.cross_check(TINY)
    assert not faults and not (tmp_path / 'store').exists()
    assert cli.main(['fetch', TINY, '--cross-check']) == cli.OK
    out = capsys.readouterr().out
    lines = json.loads(out[out.index('{'):])
    assert [source['sha256'] for source in lines['sources']] == [
        __import__('hashlib').sha256(data).hexdigest() for data in (files['tiny'], files['legacy'])]
    assert [source['size'] for source in lines['sources']] == [len(files['tiny']), len(files['legacy'])]
    assert lines['digest'] == store.fetch(TINY).conversion.digest
    host.files[drive_id(TINY)] = files['other']
    assert cli.main(['fetch', TINY, '--cross-check']) == cli.REFUSED
    assert 'drive and flowvision differ in 1 of' in capsys.readouterr().err
    host.faults[drive_id(TINY)] = ['quota']
    assert cli.main(['fetch', TINY, '--cross-check']) == cli.NETWORK
    assert 'drive: 127.0.0.1' in capsys.readouterr().err
    with pytest.raises(FetchError, match='no second host'):
        store.cross_check(FPN)
    assert left(tmp_path / 'store')[0] == TINY and len(left(tmp_path / 'store')) == 4


def test_a_dense_tag_is_a_pyramid_with_its_groups(host, tiny, tmp_path):
    with pytest.raises(CheckpointError, match=rf'{FPN} is the backbone.*features_only=True.*crossformer_small\.in1k'):
        timm.create_model(FPN, pretrained=True)
    assert not host.requests
    model = timm.create_model(FPN, pretrained=True, features_only=True).eval()
    assert model.stages_0.blocks[0].attn.group_size == (14, 14) and model.stages_0.blocks[1].attn.interval == 16
    again = timm.create_model(f'local-dir:{tmp_path / "store" / FPN}', pretrained=True, features_only=True).eval()
    x = torch.rand(1, 3, 70, 90)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(model(x), again(x), strict=True))
    chosen = timm.create_model(FPN, pretrained=True, features_only=True, group_size=7, interval=(8, 4, 2, 1))
    assert chosen.stages_0.blocks[0].attn.group_size == (7, 7)
    assert timm.create_model(FPN, features_only=True).stages_0.blocks[0].attn.group_size == (14, 14)


@pytest.mark.parametrize('groups', [(7, 7, 7, 7), (4, 4, 14, 7)], ids=str)
def test_groups_in_a_checkpoint_win_over_the_tags(host, tmp_path, groups):
    dense = {f'backbone.{k}': t for k, t in weights('det-crossformer_small').items()}
    text = f'model = dict(backbone=dict(group_size={list(groups)}, crs_interval=[8, 4, 2, 1]))'
    torch.save({'state_dict': dense, 'meta': {'config': text}}, tmp_path / 'x.pth')
    host.files[drive_id(FPN)] = (tmp_path / 'x.pth').read_bytes()
    for _ in range(2):
        model = timm.create_model(FPN, pretrained=True, features_only=True)
        assert [stage.blocks[0].attn.group_size[0] for stage in (
            model.stages_0, model.stages_1, model.stages_2, model.stages_3)] == list(groups)
        assert model.stages_0.blocks[1].attn.interval == 8
    chosen = timm.create_model(FPN, pretrained=True, features_only=True, group_size=5)
    assert chosen.stages_0.blocks[0].attn.group_size == (5, 5)


def test_an_account_is_asked_first_and_only_if_it_is_named(host, files, tiny, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(download, 'WAIT', 0.001)
    constants = huggingface_hub.constants
    for name, value in host.environment(tmp_path / 'store').items():
        monkeypatch.setenv(name, value)
    with HubServer() as server:
        ask_here(monkeypatch, server.endpoint)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        timm.create_model(TINY, pretrained=True)
        assert not server.requests
        server.repos[f'someone/{TINY}'] = {
            'model.safetensors': (tmp_path / 'store' / TINY / 'model.safetensors').read_bytes()}
        monkeypatch.setenv('TIMM_CROSSFORMER_HUB', 'someone')
        monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(tmp_path / 'second'))
        host.requests.clear()
        assert equal(timm.create_model(TINY, pretrained=True), tiny)
        assert server.requests and not host.requests and store.stored(TINY).fetched_from == 'hub'
        monkeypatch.setenv('TIMM_CROSSFORMER_HUB', 'nobody')
        monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(tmp_path / 'third'))
        assert equal(timm.create_model(TINY, pretrained=True), tiny)
        assert host.requests and store.stored(TINY).fetched_from == 'drive'


def test_threads_wait_for_the_first(host, tiny):
    host.gate.clear()
    models = []

    def create():
        models.append(timm.create_model(TINY, pretrained=True))

    threads = [threading.Thread(target=create) for _ in range(3)]
    for thread in threads:
        thread.start()
    host.gate.set()
    for thread in threads:
        thread.join()
    assert len(models) == 3 and all(equal(model, tiny) for model in models) and len(host.requests) == 1


SCRIPT = """
import sys, timm, timm_crossformer, torch
if len(sys.argv) > 1:
    file, rank = sys.argv[1:]
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=int(rank), world_size=2)
model = timm.create_model('crossformer_tiny', pretrained=True)
print(float(model.norm.weight.double().sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize('distributed', [False, True], ids=['apart', 'distributed'])
def test_processes_fetch_once(host, tiny, tmp_path, distributed):
    (tmp_path / 'script.py').write_text(SCRIPT)
    env = dict(os.environ, OMP_NUM_THREADS='1', **host.environment(tmp_path / 'store'))
    host.gate.clear()
    running = [
        subprocess.Popen(
            [sys.executable, 'script.py', *([str(tmp_path / 'rendezvous'), str(rank)] if distributed else [])],
            env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for rank in range(2)]
    threading.Timer(8, host.gate.set).start()
    outs = [process.communicate(timeout=120)[0] for process in running]
    assert [float(out) for out in outs] == [float(tiny['norm.weight'].double().sum())] * 2
    assert len(host.requests) == 1


@pytest.mark.slow
def test_a_killed_process_spoils_nothing(host, tiny, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    host.gate.clear()
    process = subprocess.Popen(
        [sys.executable, 'script.py'], cwd=tmp_path, env=dict(os.environ, **host.environment(tmp_path / 'store')))
    while not host.requests:
        pass
    process.kill()
    process.wait()
    host.gate.set()
    assert any(path.is_dir() for path in (tmp_path / 'store').iterdir())
    assert equal(timm.create_model(TINY, pretrained=True), tiny)
    assert os.listdir(tmp_path / 'store') == [TINY]


def test_damage_in_the_store_is_found(host, tiny, tmp_path, capsys):
    path = tmp_path / 'store' / TINY / 'model.safetensors'
    timm.create_model(TINY, pretrained=True)
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    for fetch in (lambda: store.fetch(TINY), lambda: timm.create_model(TINY, pretrained=True)):
        with pytest.raises(CheckpointError, match=rf'is damaged: its sha256.*`timm-crossformer fetch {TINY} --force`'):
            fetch()
    assert cli.main(['fetch', TINY, '--force']) == cli.OK
    assert equal(timm.create_model(TINY, pretrained=True), tiny)


def test_a_store_that_cannot_be_written_is_named(host, tmp_path, monkeypatch):
    (tmp_path / 'store').touch()
    for root in (tmp_path / 'store', tmp_path / 'store' / 'inside'):
        monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(root))
        with pytest.raises(FetchError, match=rf'store that can be written, got {root}: .*TIMM_CROSSFORMER_CACHE'):
            timm.create_model(TINY, pretrained=True)
    assert not host.requests


def homeless(monkeypatch):
    for name in ('HOME', 'TIMM_CROSSFORMER_CACHE', 'XDG_CACHE_HOME', 'USERPROFILE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # as for a user id without an entry


def test_without_a_home_the_variable_is_named(host, tiny, tmp_path, monkeypatch, capsys):
    homeless(monkeypatch)
    with pytest.raises(FetchError, match=r'needs a home directory.*TIMM_CROSSFORMER_CACHE'):
        timm.create_model(TINY, pretrained=True)
    assert cli.main(['fetch', TINY]) == cli.NETWORK and 'Traceback' not in capsys.readouterr().err
    assert cli.main(['list']) == cli.OK and not host.requests
    assert 'drive' in capsys.readouterr().out
    assert equal(timm.create_model(TINY, pretrained=True, cache_dir=str(tmp_path)), tiny)


def test_weights_are_fetched_without_stderr(host, tiny, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', None)
    host.faults[drive_id(TINY)] = ['quota']  # and the note that the other host was asked
    assert equal(timm.create_model(TINY, pretrained=True), tiny)
    assert sys.stderr is None and cli.main(['fetch', TINY]) == cli.OK


def test_credentials_and_tokens_are_used_and_never_told(host, tiny, files, tmp_path, monkeypatch, capsys, caplog):
    secret = host.address.replace('//', '//me:pa55word@')
    monkeypatch.setenv('TIMM_CROSSFORMER_DRIVE_URL', f'{secret}/drive')
    monkeypatch.setenv('TIMM_CROSSFORMER_FLOWVISION_URL', f'{secret}/t0ken/flowvision')
    host.login = 'me:pa55word'
    told = [str(caplog.text)]
    for source in ('drive', 'flowvision'):
        store.fetch(TINY, source=source, force=True)
        config = (tmp_path / 'store' / TINY / 'config.json').read_text()
        assert f'"{host.address} for https://' in config
        told.append(config + (tmp_path / 'store' / TINY / 'README.md').read_text())
    assert any('/t0ken/' in request for request in host.requests)
    for fault in ('404', '503', 'quota', 'unknown', 'cut', 'flip', '401'):
        host.faults[drive_id(TINY)] = [fault] * 9
        host.faults[source_of(TINY, 'flowvision').name] = [fault] * 9
        try:
            store.fetch(TINY, force=True)
        except (FetchError, CheckpointError) as e:
            told.append(''.join(traceback.format_exception(e)))
        cli.main(['fetch', TINY, '--force', '--json'])
        told.extend(capsys.readouterr())
    host.login = 'me:other'
    with pytest.raises(FetchError, match='no permission') as e:
        store.fetch(TINY, force=True)
    told.append(''.join(traceback.format_exception(e.value)))
    monkeypatch.setenv('TIMM_CROSSFORMER_DRIVE_URL', 'http://me:pa55word@127.0.0.1:9/t0ken')
    monkeypatch.setenv('TIMM_CROSSFORMER_FLOWVISION_URL', 'http://me:pa55word@nowhere.invalid/t0ken')
    with pytest.raises(FetchError, match='no network connection') as e:
        store.fetch(TINY, force=True)
    told.append(''.join(traceback.format_exception(e.value)))
    for text in (*told, caplog.text):
        assert 'pa55word' not in text and 't0ken' not in text


def test_list_says_where_weights_are(host, capsys):
    def shown(tag):
        assert cli.main(['list', tag]) == cli.OK
        return capsys.readouterr().out.splitlines()[-1].split('  ')[-1].strip()

    assert shown(TINY) == 'drive, flowvision' and shown('crossformer_pp_huge.in1k') == 'browser only'
    assert shown('test_crossformer.cifar10') == 'in this package' and shown(FPN) == 'drive'
    store.fetch(TINY)
    assert shown(TINY) == 'in the store, drive, flowvision'
    assert cli.main(['fetch', TINY, 'test_crossformer', '--json']) == cli.OK
    told = json.loads(capsys.readouterr().out)
    assert told[0]['fetched_from'] == 'drive' and told[1]['fetched_from'] == 'package'


@pytest.mark.parametrize('argv, code', [
    (['fetch', 'crossformer_tiny.none'], cli.USAGE), (['fetch', 'resnet50'], cli.USAGE),
    (['fetch', TINY, FPN, '--from', 'x'], cli.USAGE),
    (['fetch', TINY, '--cross-check', '--source', 'drive'], cli.USAGE),
    (['fetch', TINY, '--from', 'nothing.pth'], cli.REFUSED), (['fetch', 'crossformer_lucidrains'], cli.USAGE),
    (['fetch', 'test_crossformer', '--from', 'x'], cli.REFUSED),
    (['fetch', 'test_crossformer', '--source', 'hub'], cli.REFUSED),
    (['fetch', 'crossformer_small.birder_arabian_peninsula_256', '--from', 'x'], cli.REFUSED),
    (['fetch', 'crossformer_small.birder_arabian_peninsula_256', '--source', 'drive'], cli.REFUSED),
], ids=str)
def test_wrong_usage_of_fetch(host, argv, code, capsys, tmp_path):
    assert cli.main(argv) == code
    assert 'Traceback' not in capsys.readouterr().err and not host.requests and left(tmp_path) == []


def test_published_tags_are_known_to_timm():
    listed = timm.list_pretrained('crossformer_*')
    assert TINY in listed and FPN in listed and len(listed) == 20
    cfg = timm.models.get_pretrained_cfg(TINY)
    assert cfg.hf_hub_id is None and not str(cfg.url).startswith('http')


def test_no_request_is_made_by_importing_or_listing(host, tmp_path):
    script = (
        'import timm, timm_crossformer; timm.list_pretrained(); timm.create_model("crossformer_tiny", device="meta")')
    subprocess.run([sys.executable, '-c', script], check=True, env=dict(os.environ, **host.environment(tmp_path / 's')))
    assert not host.requests and not (tmp_path / 's').exists()


def test_the_digest_is_that_of_names_types_shapes_and_bytes():
    a, b = {'x': torch.ones(2), 'y': torch.zeros(3)}, {'y': torch.zeros(3), 'x': torch.ones(2)}
    assert writing.tensor_digest(a) == writing.tensor_digest(b)
    for other in ({**a, 'x': torch.ones(2).half()}, {**a, 'x': torch.ones(1, 2)}, {'z': a['x'], 'y': a['y']},
                  {**a, 'x': torch.tensor([1., 1.0000001])}):
        assert writing.tensor_digest(other) != writing.tensor_digest(a)
    assert writing.tensor_digest({'s': torch.tensor(1.), 'e': torch.zeros(0), 't': torch.rand(3, 2).t()})
