"""Peak memory of a stretch of code: device memory on a GPU, resident memory of the process on Linux.

Linux keeps the high-water mark of resident memory and lets a process reset its own (`/proc/self/clear_refs`), so the
peak of one contestant can be read without starting a process for it. Pages freed earlier and not yet returned to
the system hide growth: build contestants once before you compare their memory, or compare in fresh processes.
"""

import re
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as peak: …`; then `peak.bytes` is the growth at the highest point (None: unknown)."""

    def __init__(self, device: str):
        self.device, self.bytes = device, None

    def __enter__(self) -> "PeakMemory":
        self._before = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        highest = self._highest()
        if highest is not None and self._before is not None:
            self.bytes = max(0, highest - self._before)

    def _start(self) -> int | None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
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


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
