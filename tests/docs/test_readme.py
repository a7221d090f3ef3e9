"""Every code block of the README and of docs/ does what it says, every link leads somewhere."""
import re
import shlex
from pathlib import Path

import pytest
import torch
import train
import yaml
from common import official_weights

from timm_crossformer import export
from timm_crossformer.checkpoints import reading, transfer
from timm_crossformer.cli import build_parser, main

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path: path.read_text(encoding='utf-8') for path in (
    *sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('docs/*.md')),
    *(ROOT / name / 'README.md' for name in ('benchmarks', 'examples', 'weights')))}
CODE = re.compile(r'```(\w*)\n(.*?)```', re.DOTALL)
# Of docs/practice.md, tests/docs/test_practice.py runs all.
READ = [ROOT / 'README.md', *sorted({*ROOT.glob('docs/*.md')} - {ROOT / 'docs' / 'practice.md'})]
BLOCKS = [(path, *block) for path in READ for block in CODE.findall(PAGES[path])]
COMMANDS = [(path, line) for path, kind, block in BLOCKS if kind == 'sh' for line in block.splitlines()]


def commands(start):
    return [line for _, line in COMMANDS if line.startswith(start)]


def page(path):
    return str(path.relative_to(ROOT))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_every_kind_of_block_is_known():
    assert {kind for _, kind, _ in BLOCKS} == {'python', 'text', 'sh', 'bibtex'}


@pytest.mark.parametrize('path, block', [
    pytest.param(path, block, id=f'{page(path)}:{block[:40]}') for path, kind, block in BLOCKS if kind == 'python'])
def test_python_blocks_run_and_print_what_stands_below(path, block, capsys):
    exec(compile(block, page(path), 'exec'), {})
    below = CODE.match(PAGES[path].partition(f'```python\n{block}```')[2].lstrip())
    assert capsys.readouterr().out == (below[2] if below and below[1] == 'text' else '')


def test_output_stands_below_code():
    kinds = [kind for _, kind, _ in BLOCKS]
    assert 'text' in kinds and all(kinds[i - 1] == 'python' for i, kind in enumerate(kinds) if kind == 'text')


@pytest.mark.parametrize('line', commands('timm-crossformer'))
def test_commands_parse(line):
    build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize('line', commands('make'))
def test_make_targets_exist(line):
    assert f'\n{line.split()[1]}: ' in (ROOT / 'Makefile').read_text()


def test_what_pip_is_asked_for_exists():
    extras = {name for line in commands('pip') for name in re.findall(r'\w+', line.partition('[')[2])}
    known = (ROOT / 'pyproject.toml').read_text().partition('[project.optional-dependencies]')[2]
    assert extras >= {'viz'} and all(re.search(rf'^{name} = ', known, re.MULTILINE) for name in extras)


def test_the_training_command_parses():
    benchmarks = PAGES[ROOT / 'benchmarks' / 'README.md']
    line, = (line for line in benchmarks.splitlines() if line.startswith('torchrun') and '--recipe' in line)
    program, *arguments = shlex.split(line)[3:]
    assert (ROOT / program).exists()
    assert train.parse_args(arguments).recipe == 'imagenet'


def test_weights_commands_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': official_weights('cls-crossformer_small'), 'epoch': 299}, 'crossformer-s.pth')
    lines = [shlex.split(line)[1:] for _, line in COMMANDS if 'crossformer_small.in1k' in line]
    assert [line[0] for line in lines] == ['convert', 'verify', 'push']
    assert main(lines[0]) == 0
    capsys.readouterr()
    assert main(lines[1]) == 1  # synthetic weights see no cat
    report = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in report if line.startswith('FAIL')] == ['photo:']
    assert main([*lines[2], '--dry-run']) == 0


def test_demo_command_draws_the_pyramid(tmp_path, capsys):
    line, = commands('timm-crossformer features')
    arguments = shlex.split(line)[1:]
    arguments[arguments.index('examples/photo.jpg')] = str(ROOT / 'examples' / 'photo.jpg')
    arguments[arguments.index('outputs/pyramid.png')] = str(tmp_path / 'new' / 'pyramid.png')
    assert main(arguments) == 0
    assert re.search(r'×75×113  \d+×38×57  \d+×19×29  \d+×10×15$', capsys.readouterr().out.strip())
    assert (tmp_path / 'new' / 'pyramid.png').stat().st_size > 10_000


def test_demo_command_names_the_cat_on_the_photo(capsys):
    line, = commands('timm-crossformer classify')
    assert f'\n\t$(BIN)/{line}\n' in (ROOT / 'Makefile').read_text()
    assert main(['classify', str(ROOT / shlex.split(line)[2])]) == 0
    first, *_ = [row for row in capsys.readouterr().out.splitlines() if '%' in row]
    assert first.split()[-1] == 'cat'


def test_the_picture_of_the_readme_is_what_the_command_draws(tmp_path):
    numpy, image = pytest.importorskip('numpy'), pytest.importorskip('PIL.Image')
    line, = commands('timm-crossformer attention')
    arguments = shlex.split(line)[1:]
    arguments[arguments.index('examples/photo.jpg')] = str(ROOT / 'examples' / 'photo.jpg')
    arguments[arguments.index('outputs/attention.png')] = str(tmp_path / 'attention.png')
    assert main(arguments) == 0
    drawn, shown = (
        numpy.asarray(image.open(path).convert('RGB').resize((105, 48))).astype(float)
        for path in (tmp_path / 'attention.png', ROOT / 'examples' / 'attention.png'))
    assert abs(drawn - shown).mean() < 3  # of 255: fonts and processors differ
    assert (ROOT / 'examples' / 'attention.png').stat().st_size <= 200 * 1024


# ---- links


def anchors(text):
    """List what a page of Markdown can be entered by: its headings, as they are written in links."""
    headings = re.findall(r'^#+ (.*)$', CODE.sub('', text), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(text):
    return re.findall(r'\]\((?!https?:)([^)\s]+)\)', CODE.sub('', text))


@pytest.mark.parametrize('path', PAGES, ids=page)
def test_links_lead_somewhere(path):
    for link in links(PAGES[path]):
        name, _, anchor = link.partition('#')
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding='utf-8')), link


def test_every_page_is_reached_from_the_readme():
    reached = {(ROOT / link.partition('#')[0]).resolve() for link in links(README)}
    assert reached >= {*ROOT.glob('docs/*.md'), ROOT / 'SECURITY.md', ROOT / 'examples' / 'README.md'}


def test_broken_links_are_noticed():
    text = '# A b: `c`\n[x](gone.md#d) [y](https://e) ![z](f.png)\n```python\n# No heading\n[g](h)\n```\n'
    assert links(text) == ['gone.md#d', 'f.png'] and anchors(text) == {'a-b-c'}


# ---- what is said of code


def test_bounds_of_files_are_those_of_the_code():
    bounds = re.findall(r'^\| .* \| ([\d,]+)( \w+)? \|$', PAGES[ROOT / 'SECURITY.md'], re.MULTILINE)
    units = {'': 1, ' MiB': 2 ** 20, ' GiB': 2 ** 30}
    assert [int(number.replace(',', '')) * units[unit] for number, unit in bounds] == [
        reading._MAX_PICKLE, reading._MAX_KEYS, reading._MAX_ONEFLOW, transfer.MAX_SIZE]


def test_sizes_of_exported_files_are_those_of_the_code():
    said = set(re.findall(r'(\d+) to ([\d,]+) px', PAGES[ROOT / 'docs' / 'deploy.md']))
    assert said == {(str(export.MIN_SIZE), f'{export.MAX_SIZE:,}')}


def test_the_papers_are_cited_as_in_the_notice():
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    notice, bibtex = (ROOT / 'NOTICE').read_text(), PAGES[ROOT / 'docs' / 'cite.md']
    assert cited['license'] == 'MIT' and cited['authors'][0]['name'] in (ROOT / 'LICENSE').read_text()
    assert len(cited['references']) == 2
    for paper in cited['references']:
        names = ', '.join(author['family-names'] for author in paper['authors'])
        assert f'- {paper["title"]}\n  '.replace('Attention', 'Attention.') + f'{names}. ' in notice
        assert f'{paper["year"]}. {paper["identifiers"][0]["value"]}.' in notice
        persons = ' and '.join(f'{author["family-names"]}, {author["given-names"]}' for author in paper['authors'])
        assert f'title = {{{paper["title"]}}},\n  author = {{{persons}}},' in bibtex
