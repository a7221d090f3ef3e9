"""With `python -W error` whatever users do is silent: import, create, run, train, compile, save, and every command.

Exports of other formats are in test_export.py. Left out: TorchScript, whose end torch announces to everybody who asks
for it, and what older versions of torch say of themselves while they compile.
"""
import json
import subprocess
import sys
from pathlib import Path

import torch
import versions

NEWEST = dict(line.split('==') for line in versions.constraints('newest'))['torch']
ROOT = Path(__file__).parents[2]
PHOTO = str(ROOT / 'examples' / 'photo.jpg')

USES = {
    'import': 'import timm, timm.optim, timm_crossformer, torch',
    'create': '''
model = timm.create_model('test_crossformer', num_classes=3).eval()
short = timm.create_model('test_crossformer', num_classes=3, depths=(1, 1, 2, 1))  # compiles in half the time
x = torch.randn(2, 3, 64, 72)
''',
    'forward': 'model(x).sum().item()',
    'pyramid': "timm.create_model('test_crossformer', features_only=True)(x)",
    'pretrained': "timm.create_model('test_crossformer', pretrained=True)",
    'bfloat16': "timm.create_model('test_crossformer').bfloat16()(x.bfloat16())",
    'train': '''
model.train()
model.set_grad_checkpointing()
optimizer = timm.optim.create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.9)
for _ in range(2):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.set_grad_checkpointing(False)
''',
    'compile': '''
with torch.inference_mode():
    torch.compile(short.eval(), backend='eager', dynamic=True)(x)
''',
    'compile a training step': "torch.compile(short.train(), backend='eager')(x).sum().backward()",
    'resize': '''
resized = timm.create_model('test_crossformer')
resized.set_input_size((96, 64), group_size=4, lda_grouping='region')
resized.reset_classifier(5)
resized(x)
''',
    'save': '''
import copy, pickle
copy.deepcopy(model), pickle.loads(pickle.dumps(model))
timm.models.save_for_hf(model, 'saved')
timm.create_model('local-dir:saved', pretrained=True)
torch.save({'model': model.state_dict()}, 'own.pth')
''',
}
COMMANDS = {
    'list': ['list'],
    'convert': ['convert', 'own.pth', 'converted', '--num-classes', '3'],
    'verify': ['verify', 'converted', '--against', 'own.pth'],
    'push': ['push', 'converted', 'me/model', '--dry-run'],
    'classify': ['classify', PHOTO],
    'features': ['features', PHOTO, '--out', 'pyramid.png'],
    'attention': ['attention', PHOTO, '--at', '0.4,0.6', '--out', 'attention.png'],
    'exec': ['exec', 'script.py'],
    'export torch': ['export', 'model.pt2', '--model', 'test_crossformer', '--format', 'torch', '--size', '64'],
}
# Runs every case, in one process: each one alone would import PyTorch again.
DRIVER = '''
import json, sys, traceback
names, results = {}, {}
for case, code in json.loads(sys.stdin.read()).items():
    try:
        if isinstance(code, str):
            exec(compile(code, case, 'exec'), names)
        else:
            from timm_crossformer.cli import main
            assert main(code) == 0
        results[case] = ''
    except BaseException:
        results[case] = traceback.format_exc()
with open('results.json', 'w') as file:
    json.dump(results, file)
'''


def run(cases, folder):
    (folder / 'script.py').write_text('import timm\nassert timm.is_model("crossformer_tiny")\n')
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-W', 'ignore:Guards may run slower on Python 3.13.0:RuntimeWarning',
         '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{DRIVER}'],
        input=json.dumps(cases), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / 'results.json').read_text())
    # A warning within a destructor cannot be raised; Python writes it.
    results['nothing unraisable'] = done.stderr if 'Exception ignored' in done.stderr else ''
    return results


def test_no_warning(tmp_path):
    cases = {**USES, **COMMANDS}
    if torch.__version__.partition('+')[0] != NEWEST:
        cases = {case: code for case, code in cases.items() if not case.startswith('compile')}
    loud = {case: error for case, error in run(cases, tmp_path).items() if error}
    assert not loud, '\n'.join(f'---- {case}\n{error}' for case, error in loud.items())
