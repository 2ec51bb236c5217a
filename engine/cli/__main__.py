"""`python -m warploom.engine.cli VERB` is `warploom VERB`."""

import sys

from . import main

sys.exit(main())
