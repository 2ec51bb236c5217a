"""Triton, or a stand-in where no kernel could be launched, so that every file imports on every machine, and at once.

Triton and what it does to each kernel take a quarter of a second to import, for which a CPU's first token would wait.
So it is imported where something can use it: a GPU, the interpreter (TRITON_INTERPRET=1), or the compiler, which needs
no GPU (WARPLOOM_TRITON=1). Elsewhere, as where it is not installed, there is a stand-in. It accepts what happens at
import time (`@triton.jit`, `tl.constexpr` in a signature) and nothing more: a kernel decorated by it can never be
launched, and dispatch never tries to.
"""

import functools
import os

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

try:
    if not (INTERPRET or torch.cuda.device_count() or os.environ.get("WARPLOOM_TRITON")):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()
    HAS_TRITON = False
else:
    HAS_TRITON = True


def cdiv(a: int, b: int) -> int:
    """Return how many tiles of b cover a."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(int(n) - 1, 0).bit_length()


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float64 stays, everything narrower becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def architecture(device: torch.device) -> int:
    """The compute capability of a device as one number: 80, 90, 100; 0 where kernels are interpreted.

    Meta tensors are compiled for whatever target the driver names: that is how budgets are checked without a GPU.
    """
    if INTERPRET or not HAS_TRITON:
        return 0
    if device.type == "cuda":
        return _capability(device)
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


if HAS_TRITON and INTERPRET:
    from . import interpreter

    interpreter.correct()
