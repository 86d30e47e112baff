"""`python -m flows run | plan | accept`."""

import sys

from flows.cli import main

sys.exit(main())
