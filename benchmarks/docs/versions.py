"""Which versions of Python, torch and timm CI runs, from pyproject.toml.

    python benchmarks/docs/versions.py oldest    constraints for an installer: the floors of `dependencies`
    python benchmarks/docs/versions.py newest    the newest versions, as they are recorded
"""
import re
import sys
import tomllib
from pathlib import Path
from typing import Dict, List

PYPROJECT = Path(__file__).parents[2] / 'pyproject.toml'


def read() -> dict:
    """Return pyproject.toml."""
    return tomllib.loads(PYPROJECT.read_text(encoding='utf-8'))


def floors() -> Dict[str, str]:
    """Return the lowest version of every dependency.

    Raises:
        ValueError: A dependency that is not NAME>=VERSION.
    """
    result = {}
    for dependency in read()['project']['dependencies']:
        match = re.fullmatch(r'([\w-]+)>=([\d.]+)', dependency)
        if not match:
            raise ValueError(f'A dependency is NAME>=VERSION, got {dependency}. Its floor is what CI installs.')
        result[match[1]] = match[2]
    return result


def constraints(versions: str) -> List[str]:
    """List the constraints of 'oldest' or 'newest'."""
    if versions == 'oldest':
        return [f'{name}=={version}' for name, version in floors().items()]
    return list(read()['tool']['timm-crossformer']['ci'][versions])


def runs() -> List[Dict[str, str]]:
    """List what CI runs: python, torch, timm, tests, command."""
    rows = []
    for run in read()['tool']['timm-crossformer']['ci']['runs']:
        exact = dict(line.split('==') for line in constraints(run['versions']))
        rows.append({**run, 'torch': exact['torch'], 'timm': exact['timm']})
    return rows


if __name__ == '__main__':
    print('\n'.join(constraints(sys.argv[1])))
