"""The command line: data on stdout, notes on stderr, exit codes that mean something."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from common import small
from PIL import Image

import timm_crossformer
from timm_crossformer import cli, explain, viz
from timm_crossformer.checkpoints import hub, records, writing
from timm_crossformer.checkpoints.files import hash_file


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('source') / 'own.pth'
    torch.save({'model': timm.create_model('test_crossformer', num_classes=1000).state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def converted(source):
    writing.convert_file(source, source.parent / 'converted')
    return source.parent / 'converted'


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp('photo') / 'photo.png'
    pixels = np.random.RandomState(0).randint(0, 255, (70, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys, *argv):
    code, out, _ = run(capsys, *argv, '--json')
    return code, json.loads(out)


def test_list(capsys):
    code, records = run_json(capsys, 'list')
    assert code == cli.OK and {'tag', 'params', 'gmacs', 'metrics', 'weights'} <= set(records[0])
    code, out, _ = run(capsys, 'list', '*tiny')
    assert code == cli.OK and '27.8M' in out and '81.5' in out and 'drive' in out and 'large' not in out
    assert run(capsys, 'list', 'nothing')[0] == cli.USAGE


def test_convert_verify_push(capsys, source, tmp_path):
    directory = tmp_path / 'out'
    code, facts = run_json(capsys, 'convert', source, directory, '--dtype', 'fp16', '--license', 'mit')
    assert code == cli.OK and facts['model'] == 'test_crossformer' and facts['dtype'] == 'float16'
    assert facts['sha256'] == hash_file(directory / 'model.safetensors')
    assert {path.name for path in directory.iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    code, out, _ = run(capsys, 'verify', directory, '--against', source)
    assert 'outputs differ by' in out and out.count('FAIL') == 1 and 'FAIL  photo: a cat is shown' in out
    assert code == cli.REFUSED  # random weights see none
    code, result = run_json(capsys, 'push', directory, 'me/model', '--dry-run')
    assert code == cli.OK and result['files']['model.safetensors'] == facts['size']


@pytest.mark.parametrize('index, ok', [(281, True), (285, True), (280, False), (286, False), (None, False)], ids=str)
@pytest.mark.parametrize('kwargs', [{}, {'in_chans': 1}, {'num_classes': 999}], ids=str)
def test_verify_classifies_the_photo(capsys, tmp_path, index, ok, kwargs):
    model = timm.create_model('test_crossformer', **{'num_classes': 1000, **kwargs})
    if index is not None:
        model.head.fc.bias.data[index] = 9.
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    writing.convert_file(tmp_path / 'x.pth', tmp_path / 'x')
    code, report = run_json(capsys, 'verify', tmp_path / 'x')
    photo = [check for check in report['checks'] if check['check'] == 'photo']
    if 'num_classes' in kwargs:
        assert not photo and code == cli.OK
        return
    if 'in_chans' in kwargs:
        assert photo[0]['ok'] and photo[0]['detail'] == 'not tried with 1 channels'
        return
    assert [check['ok'] for check in photo] == [ok] and code == (cli.OK if ok else cli.REFUSED)
    assert report['ok'] is ok and photo[0]['detail'].startswith('a cat is shown, seen are ')
    assert run(capsys, 'push', tmp_path / 'x', 'me/x', '--dry-run')[0] == cli.OK


def test_verify_without_the_photo_says_so(capsys, converted, monkeypatch, tmp_path):
    monkeypatch.setattr(records, 'photo_path', lambda: tmp_path / 'none.jpg')
    code, out, _ = run(capsys, 'verify', converted)
    assert code == cli.REFUSED and 'FAIL  photo: the photo of the package is missing' in out


def test_convert_says_what_it_wrote_and_how_to_load_it(capsys, source, tmp_path):
    code, out, _ = run(capsys, 'convert', source, tmp_path / 'out')
    assert code == cli.OK and f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)' in out


@pytest.mark.parametrize('text, expected', [
    ('7', 7), ('4,4,14,7', (4, 4, 14, 7)), ('8x11', ((8, 11),) * 4), ('8x11,4,4,2', ((8, 11), 4, 4, 2)),
])
def test_group_size_option(text, expected):
    assert cli._group_size(text) == expected


@pytest.mark.parametrize('argv', [
    [], ['unknown'], ['convert', 'x'], ['convert', 'a', 'b', '--group-size', 'x'],
    ['convert', 'a', 'b', '--interval', 'x'], ['convert', 'a', 'b', '--dtype', 'int8'],
    ['export', 'x.onnx', '--model', 'test_crossformer', '--size=-5'],
    ['export', 'x.onnx', '--model', 'test_crossformer', '--size', '8,8,8'],
], ids=' '.join)
def test_wrong_usage_exits_with_2(capsys, argv):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == cli.USAGE and 'usage' in capsys.readouterr().err


def test_refused_checkpoint_exits_with_1_and_no_traceback(capsys, tmp_path):
    (tmp_path / 'bad.pth').write_bytes(b'nothing')
    code, out, err = run(capsys, 'convert', tmp_path / 'bad.pth', tmp_path / 'out')
    assert code == cli.REFUSED and not out and 'bad.pth' in err and 'Traceback' not in err
    assert run(capsys, 'convert', tmp_path / 'none.pth', tmp_path / 'out')[0] == cli.REFUSED


def test_failed_check_exits_with_1(capsys, converted, tmp_path):
    for path in converted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1])
    code, report = run_json(capsys, 'verify', tmp_path)
    assert code == cli.REFUSED and report['ok'] is False


@pytest.mark.parametrize('damage, message', [
    (lambda folder, config: (folder / 'model.safetensors').unlink(), 'check of files: missing: model.safetensors'),
    (lambda folder, config: config.pop('architecture'), 'check of config: KeyError'),
    (lambda folder, config: config.update(model_args={'x': 1}), 'check of config: TypeError'),
    (lambda folder, config: config.update(num_classes=9), 'check of weights: .* head.fc.bias'),
    (lambda folder, config: config.clear(), 'check of config'),
], ids=['no-weights', 'no-name', 'argument', 'classes', 'empty'])
def test_a_damaged_directory_is_named(capsys, converted, photo, tmp_path, damage, message):
    folder = shutil.copytree(converted, tmp_path / 'out')
    config = json.loads((folder / 'config.json').read_text())
    damage(folder, config)
    (folder / 'config.json').write_text(json.dumps(config))
    code, _, err = run(capsys, 'classify', photo, '--weights', folder)
    assert code == cli.REFUSED and re.search(f'{folder} fails the {message}', err)


@pytest.mark.parametrize('argv', [
    ['classify', 'x', '--model', 'crossformer_lucidrains'], ['features', 'x', '--model', 'test_crossformer.untrained'],
    ['export', 'x.onnx', '--model', 'crossformer_lucidrains', '--pretrained'],
], ids=' '.join)
def test_models_without_weights_are_wrong_usage(capsys, argv):
    code, _, err = run(capsys, *argv)
    assert code == cli.USAGE and 'list` shows the names that have weights' in err


def test_absent_weights_exit_with_3(capsys, monkeypatch, photo):
    monkeypatch.setattr(hub.huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('TIMM_CROSSFORMER_CACHE', str(photo.parent / 'store'))
    code, _, err = run(capsys, 'classify', photo, '--model', 'crossformer_tiny')
    assert code == cli.NETWORK and 'timm-crossformer fetch crossformer_tiny.in1k --from FILE' in err


@pytest.mark.parametrize('weights', ['file', 'directory'])
def test_classify(capsys, source, converted, photo, weights):
    code, results = run_json(
        capsys, 'classify', photo, photo, '--weights', source if weights == 'file' else converted, '--topk', 3)
    assert code == cli.OK and len(results) == 2 and len(results[0]['classes']) == 3
    probabilities = [c['probability'] for c in results[0]['classes']]
    assert probabilities == sorted(probabilities, reverse=True)
    assert results[0]['classes'][0]['name'] != f'class {results[0]["classes"][0]["index"]}'  # ImageNet's names


def test_features_are_listed_and_drawn(capsys, converted, photo, tmp_path):
    code, results = run_json(capsys, 'features', photo, '--weights', converted, '--out', tmp_path / 'levels.png')
    assert code == cli.OK
    side = json.loads((converted / 'config.json').read_text())['pretrained_cfg']['input_size'][-1]
    expected = [[dim, side // 4 // 2 ** i, side // 4 // 2 ** i] for i, dim in enumerate((32, 48, 64, 96))]
    assert [level['shape'] for level in results[0]['levels']] == expected
    with Image.open(tmp_path / 'levels.png') as picture:
        assert picture.width > 4 * picture.height > 0


def test_grey_images(capsys, photo, tmp_path):
    torch.save(timm.create_model('test_crossformer', in_chans=1, num_classes=4).state_dict(), tmp_path / 'grey.pth')
    code, results = run_json(capsys, 'classify', photo, '--weights', tmp_path / 'grey.pth')
    assert code == cli.OK and [c['name'] for c in results[0]['classes']].count('class 0') == 1
    code, _, _ = run(capsys, 'features', photo, '--weights', tmp_path / 'grey.pth', '--out', tmp_path / 'grey.png')
    assert code == cli.OK and (tmp_path / 'grey.png').stat().st_size > 0


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match=r'pip install timm_crossformer\[viz\]'):
        viz.draw_pyramids([torch.zeros(3, 4, 4)], [[torch.zeros(8, 2, 2)]], tmp_path / 'x.png')


def test_colors_of_a_flat_or_tiny_level_are_finite():
    for level in (torch.zeros(8, 3, 3), torch.rand(8, 1, 1), torch.rand(2, 3, 1)):
        assert torch.isfinite(viz.principal_colors(level)).all()


def test_images_that_are_none_are_refused(capsys, converted, tmp_path):
    (tmp_path / 'x.jpg').write_text('x')
    code, _, err = run(capsys, 'classify', tmp_path / 'x.jpg', '--weights', converted)
    assert code == cli.REFUSED and 'is no image' in err


@pytest.mark.parametrize('command', ['classify', 'features'])
def test_one_bad_image_spoils_no_others(command, capsys, converted, photo, tmp_path):
    body = photo.read_bytes()
    (tmp_path / 'cut.png').write_bytes(body[:len(body) // 2])
    (tmp_path / 'chunk.png').write_bytes(body[:60] + bytes(30) + body[90:])
    images = [photo, tmp_path / 'cut.png', photo, tmp_path / 'chunk.png', tmp_path / 'none.png']
    code, out, err = run(capsys, command, *images, '--weights', converted, '--json')
    assert code == cli.REFUSED and [result['image'] for result in json.loads(out)] == [str(photo)] * 2
    assert all(f'{path} ' in err for path in images if path != photo) and 'Traceback' not in err
    code, out, _ = run(capsys, command, *images, '--weights', converted)
    assert code == cli.REFUSED and out.count(str(photo)) == 2
    code, _, _ = run(capsys, command, photo, '--weights', converted)
    assert code == cli.OK


@pytest.mark.parametrize('encoding', ['cp1251', 'cp437', 'ascii', 'utf-8'])
@pytest.mark.parametrize('form', [[], ['--json']], ids=['text', 'json'])
def test_results_are_written_in_any_encoding(encoding, form, converted, photo, tmp_path, monkeypatch):
    try:
        image = shutil.copy(photo, tmp_path / os.fsdecode(b'caf\xe9.png'))
    except (OSError, ValueError):
        pytest.skip('this file system wants text')
    for command in (['features', '--out', str(tmp_path / 'x.png')], ['classify']):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', stdout)
            assert cli.main([command[0], str(image), '--weights', str(converted), *command[1:], *form]) == cli.OK
        text = stdout.buffer.getvalue().decode(encoding)
        assert r'caf\udce9.png' in text and ('probability' if form and command == ['classify'] else '') in text


@pytest.mark.parametrize('kind', ['missing', 'folder', 'truncated'])
def test_images_that_cannot_be_read_are_named(kind, capsys, converted, tmp_path):
    path = tmp_path / 'x.jpg'
    if kind == 'folder':
        path.mkdir()
    elif kind == 'truncated':
        photo = (Path(__file__).parents[2] / 'examples' / 'photo.jpg').read_bytes()
        path.write_bytes(photo[:len(photo) // 2])
    code, _, err = run(capsys, 'classify', path, '--weights', converted)
    assert code == cli.REFUSED and f'{path} cannot be read: ' in err


def test_exec_registers_the_variants(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm\nassert __name__ == "__main__"\n'
        'print(timm.is_model("crossformer_tiny"), *sys.argv[1:])\nsys.exit(int(sys.argv[-1]))\n')
    for code in (0, 5):
        with pytest.raises(SystemExit) as e:
            run(capsys, 'exec', script, '--flag', code)
        assert e.value.code == code
    assert capsys.readouterr().out.startswith('True --flag 0')
    script.write_text(
        'import sys, torch\nprint("yacs.config.CfgNode" in str(torch.serialization.get_safe_globals()))\n')
    before = torch.serialization.get_safe_globals()
    code, out, _ = run(capsys, 'exec', script)
    assert code == cli.OK and out == 'True\n'
    assert set(torch.serialization.get_safe_globals()) == set(before)
    script.write_text('raise KeyError(1)\n')
    code, _, err = run(capsys, 'exec', script)
    assert code == cli.REFUSED and 'KeyError' in err
    assert run(capsys, 'exec', tmp_path / 'none.py')[0] == cli.USAGE


WORKERS = """
import multiprocessing, sys
import timm
def build(name):
    return timm.create_model(name, num_classes=3).num_classes, __name__
if __name__ == '__main__':
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(build, ['test_crossformer']))
"""


@pytest.mark.slow
@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_workers_of_a_script_have_the_models(method, tmp_path):
    (tmp_path / 'script.py').write_text(WORKERS)
    command = [sys.executable, '-m', 'timm_crossformer', 'exec', 'script.py', method]
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=root), capture_output=True, text=True, timeout=600)
    assert out.stdout == "[(3, '__mp_main__')]\n", out.stderr


@pytest.mark.slow
@pytest.mark.parametrize('start', [
    ['-m', 'timm_crossformer'], ['-c', 'import sys, timm_crossformer_cli; sys.exit(timm_crossformer_cli.main())']],
    ids=['module', 'script'])
def test_a_terminated_command_leaves_nothing(start, source, tmp_path):
    """By the package's name and by the command's: a command that hangs while it writes ends with 143."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys, time\n'
        'class Hang:\n'
        '    def find_spec(self, name, *rest):\n'
        '        if name == "timm_crossformer.export":\n'
        '            import tempfile\n'
        '            with tempfile.TemporaryDirectory(dir=sys.path[1]) as folder:\n'
        '                print("ready", flush=True)\n'
        '                time.sleep(60)\n'
        'sys.meta_path.insert(0, Hang())\n')
    root = str(Path(__file__).parents[2])
    command = [sys.executable, *start, 'export', 'x.onnx', '--model', 'test_crossformer']
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), root]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env) as process:
        assert process.stdout.readline() == 'ready\n'
        process.terminate()
        assert process.wait(60) == 143
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith('tmp')] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    'command', [[sys.executable, '-m', 'timm_crossformer'], [str(Path(sys.executable).with_name('timm-crossformer'))]],
    ids=['module', 'script'])
def test_installed_command(command):
    out = subprocess.run([*command, '--version'], capture_output=True, text=True, check=True).stdout
    assert timm_crossformer.__version__ in out


def test_attention_says_what_attention_from_gives(capsys, photo):
    code, result = run_json(capsys, 'attention', photo, '--at', '0.4,0.6', '--size', '96,144')
    assert code == cli.OK and result['at'] == [.4, .6] and result['size'] == [96, 144]
    model = timm.create_model('test_crossformer', pretrained=True)
    read, _, _ = cli._reader(model, size=(96, 144))
    assert read(photo).shape == (3, 96, 144)
    maps = explain.attention_from(model, read(photo)[None], (.4, .6))
    assert [len(blocks) for blocks in maps] == [2, 2, 4, 2] and len(result['blocks']) == 10
    for block in result['blocks']:
        weights = maps[block['stage']][block['block']].mean(dim=0)
        assert block['kind'] == ('LDA' if block['block'] % 2 else 'SDA') and block['map'] == list(weights.shape)
        assert block['attends_to'] == (weights > 0).sum() and weights[tuple(block['token'])] > 0
        assert block['weight'] == pytest.approx(weights[tuple(block['most_to'])].item(), abs=1e-5)
        assert block['token'] == list(explain.token_at((.4, .6), 96, 144, block['stage']))


@pytest.mark.parametrize('options, size', [
    (['--whole'], [70, 90]), (['--size', '72'], [72, 72]), ([], [64, 64])], ids=['whole', 'square', 'centre'])
def test_attention_takes_any_size(capsys, photo, tmp_path, options, size):
    code, result = run_json(capsys, 'attention', photo, '--at', '1,0', *options)
    assert code == cli.OK and result['size'] == size
    code, out, err = run(capsys, 'attention', photo, '--at', '1,0', *options, '--out', tmp_path / 'new' / 'a.png')
    assert code == cli.OK and 'wrote' in err and len(out.splitlines()) == 11
    with Image.open(tmp_path / 'new' / 'a.png') as picture:
        assert len(picture.convert('RGB').getcolors(1 << 24)) > 100


@pytest.mark.parametrize('options', [
    ['--at', '1.1,0'], ['--at', '0.5'], ['--at', 'a,b'], [], ['--at', '0,0', '--size', '64', '--whole'],
    ['--at', '0,0', '--size', '64,64,64'], ['--at', '0,0', '--size', '0'],
], ids=' '.join)
def test_attention_refuses_wrong_usage(capsys, photo, options):
    with pytest.raises(SystemExit) as e:
        cli.main(['attention', str(photo), *options])
    assert e.value.code == cli.USAGE and 'usage' in capsys.readouterr().err


def test_the_picture_of_attention_shows_weights_groups_and_the_token(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, '_save', lambda figure, path: figures.append(figure))
    model = small(depths=(2, 1), embed_dim=(32, 48), num_heads=(1, 2), interval=(4, 2))
    image = torch.rand(3, 66, 98)  # maps of 17 x 25 and 9 x 13 tokens
    maps = explain.attention_from(model, image[None], (.3, .8))
    viz.draw_attention(image, maps, (.3, .8), 'x.png')
    short, second, long, none, bar = figures[0].axes  # a row for each distance
    assert [axis.get_title() for axis in (short, long, second, none)] == [
        'stage 1, short: 16 of 17 × 25 tokens',
        'stage 1, long: 24 of 17 × 25 tokens',
        'stage 2, short: 16 of 9 × 13 tokens',
        'stage 2, long: no block',
    ]
    assert bar.get_xlim() == (0, 1) and not none.images
    for axis, weights, side in ((short, maps[0][0], 4), (long, maps[0][1], 4), (second, maps[1][0], 8)):
        weights = weights.mean(dim=0)
        photo, cover = axis.images
        assert tuple(photo.get_extent()) == (0, 98, 66, 0)
        assert tuple(cover.get_extent()) == (0, weights.shape[1] * side, weights.shape[0] * side, 0)
        assert axis.get_xlim() == (0, 98) and axis.get_ylim() == (66, 0)
        colors = torch.from_numpy(np.asarray(cover.get_array()))
        outside = (colors == torch.tensor([0, 0, 0, .55], dtype=colors.dtype)).all(dim=2)
        assert torch.equal(outside, weights == 0)
        order = weights[~outside].argsort()
        _, green, blue = colors[~outside][order, :3].T
        assert green[-1] > .9 > blue[-1] + .5  # the largest weight is yellow
        assert green[order.numel() // 2:].diff().min() >= 0  # and down from it, ever less so
        row, col = explain.token_at((.3, .8), 66, 98, 0 if side == 4 else 1)
        assert not outside[row, col]
        for frame in axis.patches:
            assert frame.get_bbox().bounds == (col * side, row * side, side, side)
        assert len(axis.patches) == 2
