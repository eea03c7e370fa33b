"""`python -m jrope.cli`, the same as `jrope`."""

import sys

from jrope.cli import main

sys.exit(main())
