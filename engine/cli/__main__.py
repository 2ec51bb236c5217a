"""Entry point of `python -m warploom.engine.cli VERB`, the same as `warploom VERB`."""

import sys

from . import main

sys.exit(main())
