"""Two things are decided before torch and triton are first imported.

Tests compute tiny things, many at once: one thread each is fastest, and keeps float32 sums repeatable. And where there
is no GPU, Triton kernels run in their interpreter.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
