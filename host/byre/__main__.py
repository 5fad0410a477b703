"""`python -m byre` is `byre`."""

import sys

from byre.cli import main

sys.exit(main())
