"""The search behind `warploom bench kernels --tune`: try a kernel's settings on the device, file the best.

A setting is doubled or halved as long as that helps, one after the other, until none does. Settings that fail to
compile or run out of shared memory are simply slow.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch

from . import tuned

MARGIN = 0.98
"""A change has to be this much faster to be believed."""
RANGES = {"num_warps": (1, 32), "num_stages": (1, 6)}


def search(step: Callable, timer, device: torch.device) -> Iterator[tuple[str, float, float, dict]]:
    """For each kernel that `step` launches: its name, seconds by default and at best, and the best settings, filed."""
    tuned.asked.clear()
    step()
    for kernel, (key, default) in dict(tuned.asked).items():
        first = best = _seconds(step, timer, kernel, default)
        settings = default
        improving = True
        while improving:
            improving = False
            for neighbor in _neighbors(settings):
                seconds = _seconds(step, timer, kernel, neighbor)
                if seconds < best * MARGIN:
                    settings, best, improving = neighbor, seconds, True
        if settings != default:
            tuned.record(device, kernel, key, settings)
        yield kernel, first, best, settings


def _neighbors(settings: dict) -> Iterator[dict]:
    for name, value in settings.items():
        low, high = RANGES.get(name, (1, 16384))
        for changed in (value * 2, value // 2):
            if low <= changed <= high:
                yield {**settings, name: changed}


def _seconds(step: Callable, timer, kernel: str, settings: dict) -> float:
    with tuned.trying(kernel, settings), contextlib.suppress(Exception):
        step()
        return timer.sample(step, 20)
    return float("inf")
