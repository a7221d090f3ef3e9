"""Every code block of the README does what it says."""
import re
import shlex
from pathlib import Path

import pytest
import torch
import train
from common import official_weights

from timm_crossformer.cli import build_parser, main

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == 'sh' for line in block.splitlines()]


def test_every_kind_of_block_is_known():
    assert {kind for kind, _ in BLOCKS} == {'python', 'sh', 'bibtex'}


@pytest.mark.parametrize('block', [block for kind, block in BLOCKS if kind == 'python'], ids=lambda b: b[:40])
def test_python_blocks_run(block, capsys):
    exec(compile(block, 'README.md', 'exec'), {})
    if 'pyramid' in block:
        assert capsys.readouterr().out == '[(1, 64, 120, 161), (1, 128, 60, 81), (1, 256, 30, 41), (1, 512, 15, 21)]\n'


@pytest.mark.parametrize('line', [c for c in COMMANDS if c.startswith('timm-crossformer')])
def test_commands_parse(line):
    build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize('line', [c for c in COMMANDS if c.startswith('make')])
def test_make_targets_exist(line):
    assert f'\n{line.split()[1]}: ' in (ROOT / 'Makefile').read_text()


def test_the_training_command_parses():
    line = next(c for c in COMMANDS if c.startswith('torchrun'))
    program, *arguments = shlex.split(line)[3:]
    assert (ROOT / program).exists()
    assert train.parse_args(arguments).recipe == 'imagenet'


def test_weights_commands_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': official_weights('cls-crossformer_small'), 'epoch': 299}, 'crossformer-s.pth')
    lines = [shlex.split(c)[1:] for c in COMMANDS if 'crossformer_small.in1k' in c]
    assert [line[0] for line in lines] == ['convert', 'verify', 'push']
    assert main(lines[0]) == 0
    capsys.readouterr()
    assert main(lines[1]) == 1  # synthetic weights see no cat
    report = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in report if line.startswith('FAIL')] == ['photo:']
    assert main([*lines[2], '--dry-run']) == 0


def test_demo_command_draws_the_pyramid(tmp_path, capsys):
    line = next(c for c in COMMANDS if c.startswith('timm-crossformer features'))
    arguments = shlex.split(line)[1:]
    arguments[arguments.index('examples/photo.jpg')] = str(ROOT / 'examples' / 'photo.jpg')
    arguments[arguments.index('outputs/pyramid.png')] = str(tmp_path / 'new' / 'pyramid.png')
    assert main(arguments) == 0
    assert re.search(r'×75×113  \d+×38×57  \d+×19×29  \d+×10×15$', capsys.readouterr().out.strip())
    assert (tmp_path / 'new' / 'pyramid.png').stat().st_size > 10_000


def test_demo_command_names_the_cat_on_the_photo(capsys):
    line = next(c for c in COMMANDS if c.startswith('timm-crossformer classify'))
    assert f'\n\t$(BIN)/{line}\n' in (ROOT / 'Makefile').read_text()
    assert main(['classify', str(ROOT / shlex.split(line)[2])]) == 0
    first, *_ = [row for row in capsys.readouterr().out.splitlines() if '%' in row]
    assert first.split()[-1] == 'cat'


def test_names_of_other_rooms_exist():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target
