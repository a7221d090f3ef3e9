"""Where the command `timm-crossformer` starts: help, version and wrong usage are answered at once.

Importing timm_crossformer registers the models, which takes PyTorch and timm seconds. So this module lies beside the
package: it reads the command line with the package's own parser, whose `__init__` does not run for it, and only then
imports the package as everybody else does.
"""
import contextlib
import importlib
import importlib.util
import signal
import sys
import threading
from typing import Iterator, Optional, Sequence


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return the exit code.

    Raises:
        SystemExit: The command line is wrong, or asks for help.
    """
    with _ending_cleanly():
        if 'timm_crossformer' not in sys.modules:
            _parse(argv)
            _import()
        from timm_crossformer import cli

        return cli.main(argv)


def _parse(argv: Optional[Sequence[str]]) -> None:
    """Exit if the command line is wrong or asks for help; leave no part of the package behind, which was not run."""
    spec = importlib.util.find_spec('timm_crossformer')
    assert spec  # it is installed with this module
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # knows its folder
    try:
        from timm_crossformer.cli import build_parser

        build_parser().parse_args(argv)
    finally:
        for name in [name for name in sys.modules if name.partition('.')[0] == spec.name]:
            del sys.modules[name]


def _import() -> None:
    """Import the package; an interruption ends it at once, since it would end in a traceback of numpy's."""
    with contextlib.ExitStack() as stack:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_DFL))
        importlib.import_module('timm_crossformer')


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Have SIGTERM end the command as an error would, so that nothing half-written stays."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


if __name__ == '__main__':
    sys.exit(main())
