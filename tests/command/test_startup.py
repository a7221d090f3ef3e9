"""The command answers what needs no network before it imports one: modules are counted, not seconds."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_crossformer
from timm_crossformer import cli

ROOT = Path(__file__).parents[2]
SLOW = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'huggingface_hub', 'safetensors', 'einops', 'matplotlib'}
COMMANDS = ['list', 'fetch', 'convert', 'verify', 'push', 'classify', 'features', 'attention', 'export', 'exec']

# Runs the command as a console script does, and writes to a file which modules it imported.
SCRIPT = '''
import json, sys
before, path, code = set(sys.modules), sys.argv[1], 0
try:
    from timm_crossformer_cli import main
    code = main(sys.argv[2:])
except SystemExit as e:
    code = e.code
with open(path, 'w') as file:
    json.dump({'code': code or 0, 'modules': sorted(set(sys.modules) - before)}, file)
'''


def run(tmp_path, *argv):
    out = subprocess.run(
        [sys.executable, '-c', SCRIPT, tmp_path / 'modules.json', *argv], capture_output=True, text=True, cwd=ROOT)
    assert not out.returncode, out.stderr
    return json.loads((tmp_path / 'modules.json').read_text()), out


@pytest.mark.parametrize('argv, code', [
    (['--version'], 0), (['--help'], 0), ([], 2), (['nonsense'], 2), (['convert', 'a', 'b', '--interval', 'x'], 2),
    *(([command, '--help'], 0) for command in COMMANDS),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else None)
def test_answers_without_importing_a_network(argv, code, tmp_path):
    result, out = run(tmp_path, *argv)
    assert result['code'] == code
    assert not SLOW & {module.partition('.')[0] for module in result['modules']}
    assert len(result['modules']) < 120, result['modules']
    if argv == ['--version']:
        assert out.stdout == f'timm-crossformer {timm_crossformer.__version__}\n'
    else:
        assert 'usage: timm-crossformer' in (out.stderr if code else out.stdout)


def test_commands_are_those_whose_help_is_tested(capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(['nonsense'])
    choices = capsys.readouterr().err.partition('choose from ')[2].strip(' )\n').replace("'", '')
    assert set(choices.split(', ')) == set(COMMANDS)


def test_a_command_finds_the_models_registered(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm, timm_crossformer\n'
        'print(timm.is_model("crossformer_tiny"), timm_crossformer.CrossFormer.__name__, timm_crossformer.__version__,'
        ' sys.modules["timm_crossformer"] is timm_crossformer, timm_crossformer.cli.__name__)\n')
    result, out = run(tmp_path, 'exec', str(script))
    assert out.stdout == f'True CrossFormer {timm_crossformer.__version__} True timm_crossformer.cli\n', out.stderr
    assert result['code'] == 0 and 'torch' in result['modules']


@pytest.mark.parametrize('argv', [['--help'], ['nonsense'], ['fetch', '--help']], ids=' '.join)
def test_a_program_that_asked_for_help_can_import_the_package(argv, tmp_path):
    script = (
        'import sys\nfrom timm_crossformer_cli import main\n'
        f'try:\n    main({argv})\nexcept SystemExit:\n    pass\n'
        'import timm, timm_crossformer\n'
        'assert timm.is_model("crossformer_tiny") and timm_crossformer.CrossFormer, timm_crossformer\n'
        'from timm_crossformer import cli\nassert sys.modules["timm_crossformer.cli"] is cli\n')
    out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert not out.returncode, out.stderr


def test_the_installed_script_starts_there():
    script = Path(sys.executable).with_name('timm-crossformer')
    if not script.exists():
        pytest.skip('the package is not installed')
    out = subprocess.run([sys.executable, '-X', 'importtime', script, '--version'], capture_output=True, text=True)
    assert out.stdout == f'timm-crossformer {timm_crossformer.__version__}\n'
    assert 'timm_crossformer_cli' in out.stderr and '| torch\n' not in out.stderr
