"""What is decided before torch and triton are first imported, and before any test starts a process.

Tests compute tiny things, many at once: one thread each is fastest, and keeps float32 sums repeatable. Where there is
no GPU, Triton kernels run in their interpreter. And Ctrl-C must mean Ctrl-C: a suite that was started in the background
inherits an ignored SIGINT, and would hand it on to every process it starts.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
