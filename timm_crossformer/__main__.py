"""`python -m timm_crossformer` is the command `timm-crossformer`."""
import sys

from timm_crossformer_cli import main

sys.exit(main())
