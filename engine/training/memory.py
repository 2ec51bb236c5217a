"""How much memory a step will take, before it is taken.

A micro-batch of r rows needs what does not depend on r (weights, their rounded copies, gradients, two moments) and
what grows with it (activations kept for the backward pass). So two small steps tell all others: run one row and two
rows, note the peaks, and draw the line through them. Nothing has to be known about the architecture or the kernels.

On a GPU the peak is the allocator's. On a CPU every tensor that an operation returns is watched while it lives; what
libraries allocate inside an operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..device import memory_bytes
from .evaluate import losses

if TYPE_CHECKING:
    from .trainer import Trainer

MARGIN = 0.9  # of the memory that is free: fragments and libraries need some


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, from their birth to their death."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result

    def watch(self, tensor: Tensor) -> None:
        """Count this tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_of(work: Callable[[], None], device: torch.device, standing: list[Tensor]) -> int:
    """Bytes in use at the worst moment of `work`, the `standing` tensors included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    watch = LiveTensors()
    for tensor in standing:
        watch.watch(tensor)
    with watch:
        work()
    return watch.peak


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """Peak bytes of a step as a line over the rows of a micro-batch."""

    fixed: int
    per_row: int

    def peak(self, rows: int) -> int:
        """Predicted bytes at the worst moment of a step with micro-batches of `rows`."""
        return self.fixed + rows * self.per_row

    def rows(self, available: int) -> int:
        """The most rows that stay within `available` bytes."""
        return max(0, (available - self.fixed) // max(1, self.per_row))


def measure(step: Callable[[int], None], device: torch.device, standing: list[Tensor]) -> MemoryLine:
    """The line through the peaks of `step(2)` and `step(4)`; `step(1)` warms up what is made only once."""
    step(1)
    two, four = (peak_of(lambda rows=rows: step(rows), device, standing) for rows in (2, 4))
    per_row = max(1, (four - two) // 2)
    return MemoryLine(two - 2 * per_row, per_row)


def predict(run: Trainer) -> MemoryLine:
    """The line of a run's steps, with gradients and the optimizer's moments, over the rows of one process."""
    batch = run.loader.batch(0).to(run.device)

    def step(rows: int) -> None:
        losses(run.model, batch.rows(0, rows)).total.backward()
        run.masters.zero_grad()

    masters = list(run.masters.named.values())
    line = measure(step, run.device, [*run.model.parameters(), *masters])
    moments = {"adamw": 2, "muon": 2, "sgd": 0}[run.config.optimizer]  # muon: at most two
    return MemoryLine(line.fixed + moments * sum(p.nbytes for p in masters), line.per_row)


def fewest_micro_batches(run: Trainer) -> int:
    """Into how many micro-batches a step must be cut to fit the memory that is free, the same in all processes."""
    total, size = run.config.batch_size, run.team.readers
    cuts = [n for n in range(1, total + 1) if total % n == 0 and total // n % size == 0]
    if total // size < 4:
        return 1
    line, available = predict(run), int(MARGIN * available_memory(run.device))
    fitting = (n for n in cuts if total // n // size <= line.rows(available))
    chosen = int(run.team.most(next(fitting, cuts[-1])))
    peak = line.peak(total // chosen // size)
    run.note(
        f"grad_accum_steps={chosen}: a step is predicted to take {peak / 2**20:,.0f} MiB "
        f"of the {available / 2**20:,.0f} MiB that may be used"
    )
    return chosen


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take, those it holds unused included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return memory_bytes(device) // 2
