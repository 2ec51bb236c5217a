"""Warp-specialized attention for Hopper by its copy engine (TMA): conditions and launches.

The kernels are those of every GPU, with `TMA` set: loads by descriptor, warps split by role (`attention_tiles.py`).
What the copy engine cannot address, numbers of more than 16 bits and heads of more than 128 they load by pointers.
"""

import os
import warnings

import torch

from ..core.lang import HAS_TRITON, architecture, triton
from ..core.launch import is_real
from ..core.tuned import tuned

NAMES = ("forward", "dq", "dkdv")


def _chosen(setting: str) -> set[str]:
    """The kernels that WARPLOOM_HOPPER names."""
    named = {"1": set(NAMES), "0": set()}.get(setting, set(setting.split(",")))
    if named - set(NAMES):
        raise ValueError(f"WARPLOOM_HOPPER is {setting!r}; valid are 0, 1 and names out of {','.join(NAMES)}")
    return named


hopper_kernels = _chosen(os.environ.get("WARPLOOM_HOPPER", "1"))
"""Which kernels load by descriptor on Hopper; with WARPLOOM_HOPPER=0 all load by pointers, as elsewhere."""
_proven: set[str] = set()


def tma_can_address(kernel: str, *tensors: torch.Tensor) -> bool:
    """Return whether the copy engine can address these tensors (B, T, H, D), and this device has one that we know."""
    q = tensors[0]
    if kernel not in hopper_kernels or architecture(q.device) != 90:
        return False
    return q.dtype.itemsize == 2 and q.shape[3] <= 128 and all(map(_addressable, tensors))


def _addressable(x: torch.Tensor) -> bool:
    """The copy engine wants neighbors in the last dimension, all else at multiples of 16 bytes, and no stride of 0,
    as that of a gradient expanded over tokens or heads."""
    base = x.data_ptr() if is_real((x,)) and x.device.type != "meta" else x.storage_offset() * x.itemsize
    steps = (*(n * x.itemsize for n in x.stride()[:3]), base)
    return x.numel() > 0 and x.stride(3) == 1 and min(x.stride()[1:3]) > 0 and not any(n % 16 for n in steps)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Room for the descriptors that programs write, on the device of the launch, which is the current one."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def gives_up(kernel: str, error: Exception) -> bool:
    """Return whether a launch that failed was this kernel's first, as on a compiler that refuses it. It is not tried
    again."""
    if kernel in _proven or isinstance(error, torch.OutOfMemoryError):
        return False
    hopper_kernels.discard(kernel)
    said = (str(error).splitlines() or [""])[0][:200]
    warnings.warn(
        f"attention: the Hopper kernel {kernel!r} could not be launched ({type(error).__name__}: {said}); the portable "
        f"one takes its place. WARPLOOM_HOPPER=0 does so from the start.",
        stacklevel=2,
    )
    return True


def works(kernel: str) -> None:
    """Record a kernel's first successful launch, after which a failure is an error."""
    _proven.add(kernel)


def tile_of(kernel: str, D: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Four warps, which the compiler multiplies by three; with more it ignores the split. Overflow checks
    (TRITON_DEBUG=1) would put branches into the loop: they stay off.

    To be called before each launch, in its thread: Triton asks this thread's allocator for the descriptors' room, ours
    where nobody has set one."""
    if HAS_TRITON:
        from triton.runtime import _allocation

        if type(_allocation._allocator.get()) is _allocation.NullAllocator:
            triton.set_allocator(_scratch)
    M, N = {"forward": (128, 128), "dq": (128, 64), "dkdv": (64 if D <= 64 else 32, 128)}[kernel]
    default = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": 4, "num_stages": 2}
    chosen = tuned(f"attention_hopper_{kernel}", device, f"{D} {str(dtype)[6:]}", default)
    return {**chosen, "TMA": True, "sanitize_overflow": False}
