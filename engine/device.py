"""Device detection: device, number format, threads, and measured peaks.

Peaks are measured, not looked up: a table of datasheets is wrong for shared, throttled or virtual machines. The two
that decide everything are how fast memory can be copied and how fast a large matrix product runs; every "percent of
peak" this project prints is of those, on this machine, in this process.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.cpu import gemm
from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Select the device: the one asked for, else CUDA if available, else Apple's MPS, else the CPU."""
    if device is None or str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not known; use 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA GPU here; use 'cpu' or 'auto'")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.dtype:
    """Select the dtype of matrix products: bfloat16 where the hardware multiplies it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if fast_bf16(torch.device(device)) else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; choose one of: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 products are faster than float32 here (tensor cores, AMX, AVX512-BF16).

    Intel's AVX512-bf16 alone does not: without AMX (a virtual machine may hide it) it runs at half the float32 rate.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = cpu_flags() if device.type == "cpu" else frozenset()
    return "amx_bf16" in flags or {"avx512_bf16", "sse4a"} <= flags  # sse4a: AMD alone has it


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of this CPU, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.split(":", 1)[1].split())


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_model() if device.type == "cpu" else device.type


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes(device: torch.device | str) -> int:
    """Memory of the device (of the machine, for a CPU)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished all queued work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def measured_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured peak FLOP/s: a large square product by the fastest implementation here; the denominator of MFU."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    ways = [lambda: a @ b]
    if gemm.fits(a, b):
        ways.append(functools.partial(gemm.Packed(b, both=False).multiply, a))
    return 2 * side**3 / min(_best_seconds(way, device) for way in ways)


@functools.cache
def measured_copy_bytes(device: torch.device) -> float:
    """Measured memory bandwidth: bytes per second, read plus written, of a copy far larger than the caches."""
    count = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], Tensor], device: torch.device, repeats: int = 7) -> float:
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
