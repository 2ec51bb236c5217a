"""Batch-size finder: predict a run's peak memory and choose the fewest gradient-accumulation steps that fit.

A step needs what does not depend on the rows of a micro-batch (gradients, moments) and what grows with them (what the
backward pass has to keep). So a few small steps predict all others: run 1, 2, 4, … rows, measure the peaks, and
extrapolate the last two linearly. The true curve bends once, where the backward pass overtakes the optimizer's step as
the peak; so rows double until they take most of the memory and the line predicts the next peak, or the next would not
fit.

Nothing has to be known about the architecture, the kernels or the optimizer, which takes part with gradients and a rate
of zero. On a GPU the peak is the allocator's. On a CPU it is what the system has given the process: a third more than
all tensors together is no rarity, for the C library cannot fill every gap that a freed tensor leaves. Which gaps it
leaves differs from run to run, by a tenth and more; where it leaves none, the prediction is within a tenth.

A save in the middle of a run copies the state; on a CPU the copy lies in the memory that the next step needs too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ..data.loader import Batch, Loader
from ..errors import InputError
from ..memory import PeakMemory, available_memory
from .evaluate import losses
from .run_state import RunState

MARGIN = 0.9  # share of free memory to use
STEPS = 3  # steps of a probe; after them heap fragmentation hardly changes
NEAR = 0.03  # relative error of a prediction at which the line is trusted


@dataclass(frozen=True, slots=True)
class LinearMemoryModel:
    """Linear model of peak memory over the rows of a micro-batch, in bytes on top of what is held before step 1."""

    fixed: int
    per_row: int

    def peak(self, rows: int) -> int:
        """Predicted peak, in bytes, with micro-batches of `rows`."""
        return self.fixed + rows * self.per_row

    @classmethod
    def through(cls, peaks: dict[int, int]) -> LinearMemoryModel:
        """Fit a line through the last two measured peaks (rows → bytes)."""
        if len(peaks) == 1:
            return cls(peaks[1], 0)
        (fewer, low), (more, high) = list(peaks.items())[-2:]
        per_row = max(0, (high - low) // (more - fewer))
        return cls(high - more * per_row, per_row)


def predict(run: RunState, loader: Loader, parts: int = 1) -> LinearMemoryModel:
    """Fit the memory model of a run with `parts` micro-batches a step (all numbers from 3 on need the same).

    Rows are those of one process. The run is as new afterwards.
    """
    most = run.config.batch_size // run.mesh.dp_size // parts
    peaks: dict[int, int] = {}
    held: list[int] = []  # before each probe
    line, available = LinearMemoryModel(0, 0), -run.mesh.all_reduce_max(-available_memory(run.device.type))
    for rows in (2**i for i in range(most.bit_length())):
        peak = _peak_of(run, loader, rows, parts)
        held.append(peak.before)
        peaks[rows] = int(run.mesh.all_reduce_max(peak.bytes))
        foretold, line = line.peak(rows), LinearMemoryModel.through(peaks)
        straight = line.per_row * rows > line.fixed and abs(foretold - peaks[rows]) < NEAR * peaks[rows]
        if straight or line.peak(2 * rows) > available:
            break
    return LinearMemoryModel(
        line.fixed + int(run.mesh.all_reduce_max(_kept_by_all(held))) + _copies_of_a_save(run), line.per_row
    )


def _kept_by_all(held: list[int]) -> int:
    """Bytes that the first step leaves behind whatever its rows, such as a library's compiled products.

    The first probe leaves those and what is for its own number of rows, the second only the latter.
    """
    left = [after - before for before, after in itertools.pairwise(held)]
    return max(0, left[0] - left[1]) if len(left) > 1 else 0


def _peak_of(run: RunState, loader: Loader, rows: int, parts: int) -> PeakMemory:
    """Measure the peak memory of steps with micro-batches of so many rows. The first step also allocates what all later
    ones keep."""
    batch = loader.batch(0).rows(0, rows).to(run.device)
    run.optimizer.state.clear()
    with PeakMemory(run.device.type) as peak:
        for _ in range(STEPS):
            _step(run, batch, min(parts, 3))
    run.optimizer.state.clear()
    if peak.bytes is None:
        raise InputError("grad_accum_steps=0 needs a system that tells the peak memory of a process: give a number")
    return peak


def _step(run: RunState, batch: Batch, parts: int) -> None:
    """Run a training step that changes no weight."""
    for _ in range(parts):
        losses(run.model, batch, label_smoothing=run.config.label_smoothing).total.backward()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for p in run.masters.named.values():
        if p.grad is not None:
            p.grad.zero_()
    run.optimizer.step()
    run.masters.copy_to_model()
    run.masters.zero_grad()


def _copies_of_a_save(run: RunState) -> int:
    """Bytes of the state that an asynchronous checkpoint copies, where host and device memory are the same."""
    every = run.config.save_every
    if run.device.type != "cpu" or not 0 < every < run.steps:
        return 0
    weights = sum(p.nbytes for p in run.masters.named.values())
    moments = {"adamw": 2, "muon": 1, "sgd": 0}[run.config.optimizer]
    return weights * (1 + moments + bool(run.ema.weights))


def find_grad_accum_steps(run: RunState, loader: Loader, note: Callable[[str], None]) -> int:
    """Find the fewest gradient-accumulation steps that fit into free memory, the same in all processes."""
    total, size = run.config.batch_size, run.mesh.dp_size
    cuts = [n for n in range(1, total + 1) if total % n == 0 and total // n % size == 0]
    available = int(-run.mesh.all_reduce_max(-MARGIN * available_memory(run.device.type)))
    line, chosen = predict(run, loader), 1
    if line.peak(total // size) > available and len(cuts) > 1:
        line = predict(run, loader, cuts[1])
        chosen = next((n for n in cuts[1:] if line.peak(total // n // size) <= available), cuts[-1])
    note(
        f"grad_accum_steps={chosen}: training is predicted to take {line.peak(total // chosen // size) / 2**20:,.0f} "
        f"MiB more, of the {available / 2**20:,.0f} MiB that it may"
    )
    return chosen
