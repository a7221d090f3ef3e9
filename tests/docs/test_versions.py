"""What the package says it needs, and what CI runs, are one list."""
import re
from pathlib import Path

import pytest
import readme
import versions

ROOT = Path(__file__).parents[2]
PROJECT = versions.read()['project']
RUNS = versions.runs()


def test_the_lowest_python_is_run_with_the_oldest_and_with_the_newest_versions():
    lowest = PROJECT['requires-python'].removeprefix('>=')
    assert {run['versions'] for run in RUNS if run['python'] == lowest} == {'oldest', 'newest'}
    config = versions.read()['tool']
    assert config['ruff']['target-version'] == 'py' + lowest.replace('.', '')
    assert config['mypy']['python_version'] == lowest


def test_constraints_of_the_oldest_are_the_floors():
    exact = versions.constraints('oldest')
    assert [line.replace('==', '>=') for line in exact] == PROJECT['dependencies']
    assert {'torch', 'timm'} == {line.partition('==')[0] for line in versions.constraints('newest')}


def test_a_dependency_without_a_floor_is_refused(monkeypatch):
    monkeypatch.setattr(versions, 'read', lambda: {'project': {'dependencies': ['torch>=2.9', 'timm']}})
    with pytest.raises(ValueError, match='got timm'):
        versions.floors()


def test_every_run_is_a_make_target_that_installs_its_versions():
    makefile = (ROOT / 'Makefile').read_text()
    for run in RUNS:
        assert re.search(rf'^{run["command"].removeprefix("make ")}:', makefile, re.MULTILINE), run
        assert f'benchmarks/docs/versions.py {run["versions"]}' in makefile


def test_the_table_of_versions_lists_them():
    text = readme.TABLES['versions'](ROOT)
    floors = versions.floors()
    assert f'torch {floors["torch"]} and timm {floors["timm"]}, or newer' in readme.TABLES['needs'](ROOT)
    assert text.count('| `make ') == len(RUNS)
