"""Where there is no GPU, Triton kernels run in its interpreter; that is decided when they are first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
