"""Tests compute tiny things, many at once: one thread each is fastest, and keeps float32 sums repeatable."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
