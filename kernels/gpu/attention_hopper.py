"""Warp-specialized attention for Hopper (TMA): conditions and launches.

The kernels are those of every GPU, with `TMA` set: loads by descriptor, warps split by role (`attention_tiles.py`).
Tensors that TMA cannot address, dtypes of more than 16 bits and heads of more than 128 are loaded by pointers.
"""

import os
import warnings

import torch

from ..core.lang import HAS_TRITON, architecture, triton
from ..core.launch import is_real
from ..core.tuned import tuned

NAMES = ("forward", "dq", "dkdv")


def _chosen(setting: str) -> set[str]:
    """Kernels selected by WARPLOOM_HOPPER."""
    named = {"1": set(NAMES), "0": set()}.get(setting, set(setting.split(",")))
    if named - set(NAMES):
        raise ValueError(f"WARPLOOM_HOPPER is {setting!r}; valid are 0, 1 and names out of {','.join(NAMES)}")
    return named


hopper_kernels = _chosen(os.environ.get("WARPLOOM_HOPPER", "1"))
"""Which kernels load by descriptor on Hopper; with WARPLOOM_HOPPER=0 all load by pointers, as elsewhere."""
_proven: set[str] = set()


def tma_can_address(kernel: str, *tensors: torch.Tensor) -> bool:
    """Return whether TMA can address these tensors (B, T, H, D), on a device where we use it."""
    q = tensors[0]
    if kernel not in hopper_kernels or architecture(q.device) != 90:
        return False
    return q.dtype.itemsize == 2 and q.shape[3] <= 128 and all(map(_addressable, tensors))


def _addressable(x: torch.Tensor) -> bool:
    """TMA's alignment rules: unit stride in the last dimension, all other strides multiples of 16 bytes and not 0 (as
    in gradients expanded over tokens or heads)."""
    base = x.data_ptr() if is_real((x,)) and x.device.type != "meta" else x.storage_offset() * x.itemsize
    steps = (*(n * x.itemsize for n in x.stride()[:3]), base)
    return x.numel() > 0 and x.stride(3) == 1 and min(x.stride()[1:3]) > 0 and not any(n % 16 for n in steps)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Workspace for the tensor descriptors that programs write, on the device of the launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def disable_after_first_failure(kernel: str, error: Exception) -> bool:
    """Return whether a failed launch was this kernel's first one, as on a compiler that refuses it; it is not tried
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


def mark_working(kernel: str) -> None:
    """Record a kernel's first successful launch; any later failure is an error."""
    _proven.add(kernel)


def tile_of(kernel: str, D: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Launch settings: four warps, which the compiler triples; with more, it ignores warp specialization. Overflow
    checks (TRITON_DEBUG=1) would put branches into the loop: they stay off.

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
