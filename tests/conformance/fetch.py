"""Fetch timm's tests: unpack them from the source distribution of the installed timm into .cache, which git ignores.

    python tests/conformance/fetch.py

Needs pip and pdm-backend, timm's build system, in the environment. Does nothing where the tests lie already.
"""
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[2] / '.cache' / f'timm-{version("timm")}'
PACKAGE = 'timm_tests'  # below CACHE: the folder tests of the source distribution, under a name of its own


def fetch() -> None:
    """Download and unpack; the folder appears when it is complete.

    Raises:
        RuntimeError: The source distribution cannot be had.
    """
    if (CACHE / PACKAGE).is_dir():
        return
    requirement = f'timm=={version("timm")}'
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        done = subprocess.run([
            sys.executable, '-m', 'pip', 'download', '-q', '--disable-pip-version-check', '--no-deps',
            '--no-binary', ':all:', '--no-build-isolation', '--dest', folder, requirement,
        ], capture_output=True, text=True)
        archives = list(Path(folder).glob('timm-*.tar.gz'))
        if done.returncode or len(archives) != 1:
            reason = done.stderr.strip().splitlines()[-1:] or ['pip wrote no archive']
            raise RuntimeError(
                f'The source distribution of {requirement}, which holds timm\'s tests, could not be downloaded: '
                f'{reason[0]}. Try again with a connection to a package index, or unpack its folder tests as '
                f'{CACHE / PACKAGE}.')
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter='data')
        (archives[0].with_suffix('').with_suffix('') / 'tests').rename(CACHE / PACKAGE)


if __name__ == '__main__':
    try:
        fetch()
    except RuntimeError as e:
        sys.exit(str(e))
