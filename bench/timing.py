"""Fair timing: one clock for all, interleaved contestants, medians with quartiles.

A machine drifts: it warms up, throttles, and serves other people. Measuring A ten times and then B ten times
charges that drift to one of them. Here every round times each contestant once, each second round in reverse
(A B, B A, …), and the starting place rotates, so that drift falls on all alike and each round gives one *paired*
ratio. What is reported is the median over rounds, with the quartiles.

On a CPU the clock is `perf_counter`, and calls too short for it are repeated inside a sample. On a GPU the clock is
a pair of events around each call, after a read of a buffer larger than the L2 cache: inputs are cold, as they would
be inside a model, and no dirty line is left to be written back during the measurement.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

Call = Callable[[], object]


class WallTimer:
    """Wall-clock timer; short calls are repeated until a sample lasts `min_sample` seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, min_sample: float = 0.005):
        self.clock, self.min_sample = clock, min_sample

    def calls(self, estimate: float) -> int:
        """Number of calls in a sample of what takes `estimate` seconds."""
        return min(100_000, max(1, math.ceil(self.min_sample / max(estimate, 1e-9))))

    def sample(self, call: Call, calls: int) -> float:
        """Mean seconds of `calls` calls in a row."""
        begin = self.clock()
        for _ in range(calls):
            call()
        return (self.clock() - begin) / calls


class CudaTimer:
    """CUDA-event timer, with a cold L2 cache before each call."""

    def __init__(self, min_sample: float = 0.005):
        import torch

        self.torch, self.min_sample, self.clock = torch, min_sample, time.perf_counter
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.evict = torch.ones(max(4 * cache_bytes, 256 * 2**20) // 4, device="cuda")

    def calls(self, estimate: float) -> int:
        """Number of calls in a sample of what takes `estimate` seconds."""
        return min(50, max(1, math.ceil(self.min_sample / max(estimate, 1e-6))))

    def sample(self, call: Call, calls: int) -> float:
        """Median seconds of `calls` calls, all enqueued before the first is read."""
        cuda = self.torch.cuda
        events = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(calls)]
        cuda.synchronize()
        for begin, end in events:
            self.evict.sum()
            begin.record()
            call()
            end.record()
        cuda.synchronize()
        return median(begin.elapsed_time(end) for begin, end in events) / 1e3


Timer = WallTimer | CudaTimer


def timer_for(device: str) -> Timer:
    """Timer of a device: CUDA events on a GPU, wall clock elsewhere."""
    return CudaTimer() if device == "cuda" else WallTimer()


def synchronize(device: str) -> None:
    """Wait until the device has finished all queued work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def order(names: list[str], turn: int) -> list[str]:
    """Order of contestants in round `turn`: rotated every second round, reversed in between.

    In 2·n rounds each of n contestants stands twice at every place."""
    shift = (turn // 2) % max(1, len(names))
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if turn % 2 else rotated


def interleave(
    calls: dict[str, Call],
    timer: Timer,
    *,
    rounds: int,
    seconds: float,
    least: int = 3,
    estimates: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Samples of each call, one a round, for at most `rounds` rounds or about `seconds` (but `least` rounds).

    estimates: what each call takes, where that is known already; else each is called once to find out."""
    known = estimates or {name: timer.sample(call, 1) for name, call in calls.items()}
    repeats = {name: timer.calls(known[name]) for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = timer.clock()
    with _no_collection():
        for turn in range(max(rounds, 1)):
            if turn >= least and timer.clock() - begin > seconds:
                break
            for name in order(list(calls), turn):
                samples[name].append(timer.sample(calls[name], repeats[name]))
    return samples


def host_seconds(call: Call, calls: int = 100, clock: Callable[[], float] = time.perf_counter) -> float:
    """Host time to issue one call, without waiting for the device."""
    call()
    begin = clock()
    for _ in range(calls):
        call()
    return (clock() - begin) / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable Python's garbage collector, so that no contestant pays for another's garbage."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
