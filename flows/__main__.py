"""`python -m flows`, which is `opd` where the package's commands aren't on the path."""

import sys

from flows.cli import main

sys.exit(main())
