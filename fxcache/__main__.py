"""``python -m fxcache`` is the command ``fxcache``."""

import sys

from fxcache.cli import main

sys.exit(main())
