"""`python -m flows`, which is `opd` where the package's commands aren't on the path."""

import gc
import sys

from flows.cli import main

code = main()
gc.freeze()  # what Prefect and DVC leave need not be looked through once more: half a second
sys.exit(code)
