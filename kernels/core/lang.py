"""Lazy import of Triton, with a stub where no kernel can be launched.

Triton and what it does to each kernel take a quarter of a second to import, for which a CPU's first token would wait.
So it is imported where something can use it: a GPU, the interpreter (TRITON_INTERPRET=1), or the compiler, which needs
no GPU (WARPLOOM_TRITON=1). Elsewhere, and where it is not installed, there is a stub. It accepts what happens at
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
    """Ceiling division."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(int(n) - 1, 0).bit_length()


def wide(x: torch.Tensor) -> torch.dtype:
    """Accumulation dtype of a reference: float64 stays, everything narrower becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def architecture(device: torch.device) -> int:
    """Compute capability of a device as one number: 80, 90, 100; 0 in the interpreter.

    Meta tensors are compiled for whatever target the driver names: that is how budgets are checked without a GPU.
    """
    if INTERPRET or not HAS_TRITON:
        return 0
    if device.type == "cuda":
        return _capability(device)
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else AMD


AMD = 42
"""Stands for any AMD GPU, whose compute capability is a number of another kind."""


def generation(device: torch.device) -> int:
    """Tensor-core generation that tiles are chosen for: 80 is `mma.sync` (also sm_86, 89, 120), 90 `wgmma`, 100
    `tcgen05` (also 103, 110), AMD its own; 0 in the interpreter."""
    return generation_of(architecture(device))


def generation_of(arch: int) -> int:
    """Tensor-core generation of an architecture number."""
    return arch if arch in (0, 90, AMD) else 100 if 100 <= arch < 120 else 80


def shared_memory(arch: int) -> int:
    """Bytes of shared memory a program may use, by architecture."""
    if arch == AMD:
        return 64 * 1024
    return 1024 * ({80: 163, 87: 163}.get(arch, 99) if generation_of(arch) == 80 else 227)


@functools.cache
def _capability(device: torch.device) -> int:
    if torch.version.hip:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


if HAS_TRITON and INTERPRET:
    from . import interpreter

    interpreter.correct()
