"""Weights from and to the Hub, with the real client against a server on the loopback address."""
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer, ask_here, go_offline

import timm_crossformer  # noqa: F401
from timm_crossformer.checkpoints import hub
from timm_crossformer.checkpoints.errors import CheckpointError, FetchError
from timm_crossformer.checkpoints.files import hash_file
from timm_crossformer.checkpoints.hub import push_directory
from timm_crossformer.checkpoints.verifying import load_model
from timm_crossformer.checkpoints.writing import convert_file

REPO = 'someone/small-cross'

# huggingface_hub uploads with an argument that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """A converted directory of a model with its own groups, classes and channels."""
    root = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    model = timm.create_model('test_crossformer', num_classes=7, in_chans=2)
    torch.save(model.state_dict(), root / 'own.pth')
    convert_file(root / 'own.pth', root / 'own', groups=dict(
        group_size=((4, 3), (4, 4), (2, 2), 3), lda_grouping='region'))
    return root / 'own'


@pytest.fixture
def server(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    with HubServer() as server:
        ask_here(monkeypatch, server.endpoint)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.delenv('HF_TOKEN', raising=False)
        yield server


@pytest.fixture
def hosted(server, directory):
    server.repos[REPO] = {path.name: path.read_bytes() for path in directory.iterdir()}
    return server


def outputs(model, chans=2):
    with torch.inference_mode():
        return model.eval()(torch.rand(1, chans, 40, 56, generator=torch.Generator().manual_seed(1)))


def test_fetches_into_an_empty_cache_and_works_offline_afterwards(hosted, directory, monkeypatch):
    expected = outputs(timm.create_model(f'local-dir:{directory}', pretrained=True))
    assert torch.equal(outputs(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), expected)
    assert sum('GET' in request and 'safetensors' in request for request in hosted.requests) == 1
    hosted.requests.clear()
    go_offline(monkeypatch)
    assert torch.equal(outputs(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), expected)
    assert not hosted.requests


@pytest.mark.parametrize('source', ['hf-hub', 'local-dir'])
@pytest.mark.parametrize(
    'change', [{}, {'num_classes': 3}, {'num_classes': 0}, {'in_chans': 5}, {'features_only': True}],
    ids=['same', 'classes', 'no-classes', 'channels', 'features'])
def test_weights_survive_changes(hosted, directory, source, change):
    name = f'{source}:{REPO if source == "hf-hub" else directory}'
    model = timm.create_model(name, pretrained=True, **change)
    source_model = timm.create_model(f'local-dir:{directory}', pretrained=True)
    block = (model.stages_1 if 'features_only' in change else model.stages[1]).blocks[0]
    assert torch.equal(block.mlp.fc1.weight, source_model.stages[1].blocks[0].mlp.fc1.weight)
    if 'features_only' in change:
        assert [level.shape[1] for level in outputs(model)] == [32, 48, 64, 96]
        return
    assert model.stages[0].blocks[0].attn.group_size == (4, 3)
    assert outputs(model, change.get('in_chans', 2)).shape[1] == change.get('num_classes', 7) or model.num_classes == 0


def test_config_rebuilds_the_model_without_repeating_num_classes(directory):
    config = json.loads((directory / 'config.json').read_text())
    assert config['num_classes'] == 7
    assert 'num_classes' not in config['model_args']  # transformers passes it a second time
    model = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
    assert model.in_chans == 2 and model.lda_grouping == 'region'
    assert model.stages[0].blocks[1].attn.group_size == (4, 3)


def test_model_card_names_import_licence_origin_and_hash(directory):
    card = (directory / 'README.md').read_text()
    sha256 = hash_file(directory / 'model.safetensors')
    assert all(text in card for text in ('import timm_crossformer', 'license:', 'own.pth', sha256))


def test_push_then_fetch(server, directory):
    result = push_directory(directory, REPO, private=True)
    assert server.private[REPO] and set(server.repos[REPO]) == {'model.safetensors', 'config.json', 'README.md'}
    assert server.repos[REPO]['model.safetensors'] == (directory / 'model.safetensors').read_bytes()
    assert f"'hf-hub:{REPO}'" in server.repos[REPO]['README.md'].decode()
    assert REPO in result['commit']
    assert torch.equal(
        outputs(timm.create_model(f'hf-hub:{REPO}', pretrained=True)),
        outputs(timm.create_model(f'local-dir:{directory}', pretrained=True)))
    push_directory(directory, REPO)  # again, into a repository that exists


def test_push_dry_run_sends_nothing(server, directory):
    assert push_directory(directory, REPO, dry_run=True)['commit'] is None
    assert not server.requests


def test_push_refuses_weights_that_differ_from_their_hash(server, directory, tmp_path):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((tmp_path / 'model.safetensors').read_bytes())
    damaged[-3] ^= 1
    (tmp_path / 'model.safetensors').write_bytes(damaged)
    with pytest.raises(CheckpointError, match='sha256'):
        push_directory(tmp_path, REPO)
    assert not server.requests


def test_push_without_permission_says_so(server, directory):
    server.token = 'hf_secret'
    with pytest.raises(FetchError, match=r'was not written at http://127\.0\.0\.1.*hf auth login'):
        push_directory(directory, REPO)


def test_credentials_in_the_hubs_address_are_never_told(server, directory, monkeypatch, tmp_path):
    secret = server.endpoint.replace('//', '//me:pa55word@') + '/t0ken'
    ask_here(monkeypatch, secret)
    told = []
    for attempt in (lambda: timm.create_model(f'hf-hub:{REPO}', pretrained=True),
                    lambda: push_directory(directory, REPO)):
        with pytest.raises(Exception) as e:
            attempt()
        if isinstance(e.value, FetchError):
            told.append(''.join(traceback.format_exception(e.value)))
    monkeypatch.setenv('TIMM_CROSSFORMER_HUB', 'someone')
    monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(tmp_path / 'store'))
    with pytest.raises(FetchError) as e:
        timm.create_model('crossformer_pp_small', pretrained=True)
    told.append(''.join(traceback.format_exception(e.value)))
    assert len(told) > 1
    for text in told:
        assert 'pa55word' not in text and 't0ken' not in text


def test_interrupted_download_is_resumed(hosted):
    hosted.faults['model.safetensors'] = ['cut']
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert sum('GET' in request and 'safetensors' in request for request in hosted.requests) == 2


def test_failed_download_leaves_nothing_that_spoils_a_retry(hosted):
    hosted.faults['model.safetensors'] = ['500']
    with pytest.raises(FetchError, match='500'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)


def test_corrupted_download_is_refused_deleted_and_fetched_again(hosted, tmp_path):
    hosted.faults['model.safetensors'] = ['flip']
    with pytest.raises(FetchError, match=r'arrived damaged.*sha256'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert not list((tmp_path / 'cache').rglob('model.safetensors'))
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b'\xff' * 8 + b[8:], lambda b: b''],
                         ids=['truncated', 'header', 'empty'])
def test_damaged_file_on_the_hub_is_one_message(hosted, damage):
    hosted.repos[REPO]['model.safetensors'] = damage(hosted.repos[REPO]['model.safetensors'])
    with pytest.raises((FetchError, CheckpointError), match='safetensors'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)


@pytest.mark.parametrize('case', [
    'missing', 'no-permission', 'offline',
    pytest.param('unreachable', marks=pytest.mark.slow),  # the client tries for long
])
def test_absent_weights_of_an_account_give_one_message(server, monkeypatch, tmp_path, case):
    monkeypatch.setenv('TIMM_CROSSFORMER_HUB', 'someone')
    monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(tmp_path / 'store'))
    if case == 'no-permission':
        server.token = 'hf_secret'
    elif case == 'offline':
        go_offline(monkeypatch)
    elif case == 'unreachable':
        nowhere = 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}'
        monkeypatch.setattr(huggingface_hub.constants, 'HUGGINGFACE_CO_URL_TEMPLATE', nowhere)
    with pytest.raises(FetchError) as e:
        timm.create_model('crossformer_pp_small', pretrained=True)
    message = str(e.value)
    if case != 'offline':
        assert f'model.safetensors of someone/crossformer_pp_small.in1k at {server.endpoint}' in message
    assert 'timm-crossformer fetch crossformer_pp_small.in1k --from FILE' in message
    happened = {'missing': '404', 'no-permission': '401', 'offline': 'HF_HUB_OFFLINE', 'unreachable': 'Hub'}
    assert happened[case] in message


def test_absent_weights_of_a_repository_give_one_message(server):
    server.repos[REPO] = {'config.json': b'{"architecture": "test_crossformer", "pretrained_cfg": {}}'}
    with pytest.raises(FetchError, match=rf'(?s)of {REPO} at http.*404.*convert FILE DIR.*hf download {REPO}'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)


@pytest.mark.filterwarnings('ignore')
def test_an_account_is_used_offline_once_its_file_is_here(server, monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_CROSSFORMER_HUB', 'someone')
    monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(tmp_path / 'store'))
    torch.save(timm.create_model('crossformer_tiny').half().state_dict(), tmp_path / 'x.pth')
    convert_file(tmp_path / 'x.pth', tmp_path / 'x')
    server.repos['someone/crossformer_tiny.in1k'] = {p.name: p.read_bytes() for p in (tmp_path / 'x').iterdir()}
    hub.hub_file('someone/crossformer_tiny.in1k', 'model.safetensors')
    server.requests.clear()
    go_offline(monkeypatch)
    timm.create_model('crossformer_tiny', pretrained=True)
    assert not server.requests


def test_pytorch_bin_is_taken_where_there_is_no_safetensors(server, directory, tmp_path, monkeypatch):
    weights = timm.create_model(f'local-dir:{directory}', pretrained=True).state_dict()
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    server.repos[REPO] = {
        'config.json': (directory / 'config.json').read_bytes(),
        'pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes(),
    }
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert torch.equal(model.norm.weight, weights['norm.weight'])
    server.requests.clear()
    go_offline(monkeypatch)
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert torch.equal(model.norm.weight, weights['norm.weight']) and not server.requests


@pytest.mark.slow
def test_birder_tag_has_its_groups_and_reads_birders_container(server, monkeypatch, tmp_path):
    birder = pytest.importorskip('birder.net.crossformer')
    config = {'embed_dim': 96, 'depths': [2, 2, 6, 2], 'num_heads': [3, 6, 12, 24], 'drop_path_rate': 0.}
    net = birder.CrossFormer(3, 735, config=config, size=(256, 256)).eval()
    torch.save({
        'state': net.state_dict(),
        'birder_version': '0.8.4',
        'task': 'image_classification',
        'signature': {'inputs': [{'data_shape': [0, 3, 256, 256]}], 'outputs': [{'data_shape': [0, 735]}]},
        'class_to_idx': {f'bird {i}': i for i in range(735)},
        'rgb_stats': {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)},
    }, tmp_path / 'birder.pt')
    repo = 'birder-project/crossformer_s_arabian-peninsula'
    server.repos[repo] = {'crossformer_s_arabian-peninsula256px.pt': (tmp_path / 'birder.pt').read_bytes()}
    tag = 'crossformer_small.birder_arabian_peninsula_256'
    with pytest.raises(FetchError, match='24feadef'):  # the manifest's hash is that of the real file
        timm.create_model(tag, pretrained=True)
    assert not list((tmp_path / 'cache').rglob('*.pt'))  # nor is it kept
    with monkeypatch.context() as patch:
        patch.setattr(hub, 'manifest', lambda: [])
        timm.create_model(tag, pretrained=True)
    with pytest.raises(FetchError, match='24feadef'):  # not from the cache either
        timm.create_model(tag, pretrained=True)
    monkeypatch.setattr(hub, 'manifest', lambda: [])
    model = timm.create_model(tag, pretrained=True).eval()
    assert model.pretrained_cfg['mean'] == (0.5, 0.4, 0.3)
    assert model._model_args['group_size'] == 8
    x = torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), net(x), atol=2e-5, rtol=0)
    model = load_model(weights=tmp_path / 'birder.pt')
    assert model.pretrained_cfg['label_names'][3] == 'bird 3'


def test_untrained_model_has_no_pretrained_weights():
    assert 'crossformer_lucidrains' not in ' '.join(timm.list_pretrained('*crossformer*'))
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('crossformer_lucidrains', pretrained=True)


@pytest.mark.slow
def test_end_to_end_in_fresh_processes(directory, tmp_path):
    """Push by the command, fetch by timm, fetch again without a network; the environment is all that tells the Hub."""
    with HubServer() as server:
        env = dict(
            os.environ, HF_ENDPOINT=server.endpoint, HF_HOME=str(tmp_path), HF_TOKEN='hf_token', HF_HUB_DISABLE_XET='1',
            TIMM_CROSSFORMER_HUB='org', OMP_NUM_THREADS='1')
        run = [sys.executable, '-m', 'timm_crossformer', 'push', str(directory), 'org/crossformer_tiny.in1k', '--json']
        pushed = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        assert json.loads(pushed.stdout)['repo_id'] == 'org/crossformer_tiny.in1k'
        script = tmp_path / 'fetch.py'
        script.write_text(
            'import timm, timm_crossformer\n'
            "model = timm.create_model('hf-hub:org/crossformer_tiny.in1k', pretrained=True)\n"
            'print(model.num_classes, timm.models.get_pretrained_cfg("crossformer_tiny").hf_hub_id)\n')
        for offline in ('0', '1'):
            fetched = subprocess.run(
                [sys.executable, str(script)], env=dict(env, HF_HUB_OFFLINE=offline), capture_output=True, text=True,
                check=True, cwd=Path(tmp_path))
            assert fetched.stdout.split() == ['7', 'None']
