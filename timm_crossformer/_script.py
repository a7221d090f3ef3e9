"""The script of `timm-crossformer exec`, run in the place of this module.

multiprocessing, and launchers of distributed training, start a `__main__` that is a module again by its name. By this
one, they import the package first, so that the models are registered in every process.
"""
import os as _os
import sys as _sys

from .checkpoints.fitting import safe_globals as _safe_globals

__file__ = _os.environ['TIMM_CROSSFORMER_SCRIPT']
if __name__ == '__main__':
    _sys.argv[0] = __file__
with open(__file__, 'rb') as _file:
    _code = compile(_file.read(), __file__, 'exec', dont_inherit=True)
with _safe_globals():  # timm's scripts read checkpoints themselves
    exec(_code)
