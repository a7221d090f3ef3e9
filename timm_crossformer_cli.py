"""Where the command `timm-crossformer` starts: help, version and wrong usage are answered at once.

Importing timm_crossformer registers the models, which takes PyTorch and timm seconds. So this module lies beside the
package: it enters the package without running its `__init__`, reads the command line, and only then imports the
package as everybody else does.
"""
import importlib.util
import signal
import sys
from typing import Optional, Sequence


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return the exit code."""
    if 'timm_crossformer' not in sys.modules:
        spec = importlib.util.find_spec('timm_crossformer')
        assert spec and spec.loader  # it is installed with this module
        package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # knows its folder, has not been run
        from timm_crossformer.cli import build_parser

        build_parser().parse_args(argv)  # exits if that is all there is to do
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an error would, it leaves nothing half-written
        # An import that is interrupted ends in a traceback of numpy's: until there is something to clear away, end.
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
        spec.loader.exec_module(package)
        signal.signal(signal.SIGINT, handler)
    from timm_crossformer import cli

    return cli.main(argv)


if __name__ == '__main__':
    sys.exit(main())
