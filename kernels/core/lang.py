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
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else AMD


AMD = 42
"""Stands for any AMD GPU, whose compute capability is a number of another kind."""


def generation(device: torch.device) -> int:
    """Whose tensor cores tiles are written for: 80 is `mma.sync` (of sm_86, 89 and 120 too), 90 `wgmma`, 100 `tcgen05`
    (of 103 and 110 too), AMD what they have; 0 where kernels are interpreted."""
    return generation_of(architecture(device))


def generation_of(arch: int) -> int:
    """The same, for the number of an architecture."""
    return arch if arch in (0, 90, AMD) else 100 if 100 <= arch < 120 else 80


def shared_memory(arch: int) -> int:
    """Bytes that one program may have: of a GPU for data centers, of another, of AMD's."""
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
