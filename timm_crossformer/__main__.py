"""`python -m timm_crossformer` is the command `timm-crossformer`."""
import sys

from .cli import main

sys.exit(main())
