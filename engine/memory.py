"""Memory measurement: peak use of a block of code, and free memory; the GPU's on a GPU, else the host's.

Linux keeps the high-water mark of resident memory and lets a process reset its own (`/proc/self/clear_refs`), so the
peak of one contestant can be read without starting a process for it. Memory that was freed but not yet returned to the
system would hide growth, so glibc is asked to return it first. What libraries load on first use still counts for
whoever comes first: run something before.
"""

import contextlib
import ctypes
import gc
import os
import re
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h; 64 and 32 MB are what its own adapting arrives at
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as peak: …`; then `peak.bytes` is the growth over `peak.before` at the highest point.

    Both are None where that cannot be known.
    """

    def __init__(self, device: str):
        self.device, self.before, self.bytes = device, None, None

    def __enter__(self) -> "PeakMemory":
        self.before = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        highest = self._highest()
        if highest is not None and self.before is not None:
            self.bytes = max(0, highest - self.before)

    def _start(self) -> int | None:
        release(self.device)
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        try:
            RESET.write_text("5")
        except OSError:
            return None
        return _status("VmRSS")

    def _highest(self) -> int | None:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")


def available_memory(device: str) -> int:
    """Bytes that this process may still allocate, including what it holds but does not use."""
    if device == "cuda":
        import torch

        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return min(free, left_in_container())


def left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory left under the container's cgroup limit; its page cache counts as free."""
    try:
        limit, used = ((folder / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        kept = next(
            line.split()[1] for line in (folder / "memory.stat").read_text().splitlines() if "inactive_file" in line
        )
        return float("inf") if limit == "max" else int(limit) - int(used) + int(kept)
    except (OSError, StopIteration):
        return float("inf")


def release(device: str) -> None:
    """Release unused memory: Python garbage, the C library's free pages, the GPU allocator's cache."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has such a call
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed(keep: bool) -> None:
    """Keep freed memory in the process (glibc's thresholds); `keep=False` returns to the system's defaults.

    glibc gives back what is free at the top of its heap. A training step on a CPU then takes 60 to 120 MB anew, page by
    page: 4 % of a step of 24M weights on two threads. Tensors of more than 32 MB stay mapped one by one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has such a call
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 << 20)
        if not keep:
            libc.malloc_trim(0)


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
