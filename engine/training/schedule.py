"""Learning rate schedules (cosine, linear, constant, WSD): stateless functions of the step.

`step` may be any measure of progress, as long as `warmup` and `total` are in the same unit: a share of time will do.
Every schedule rises linearly from 0 at step 0 to `max_lr` at step `warmup`, because Adam's first estimates of the
gradient's scale are poor and full-sized steps taken on them do lasting harm. What follows differs:

    constant  stay
    linear    fall in a straight line to `min_lr` at `total`
    cosine    fall along half a cosine: long near the top, long near the bottom
    wsd       warm up, stay, and decay linearly over the last fifth, so that a run can be prolonged from its plateau
"""

from __future__ import annotations

import math
from collections.abc import Callable

DECAY_SHARE = 0.2  # share of `total` that is WSD's cool-down


def cosine_schedule(step: float, max_lr: float, min_lr: float, warmup: float, total: float) -> float:
    """Cosine decay from `max_lr` at `warmup` to `min_lr` at `total`, constant afterwards."""
    return _warm_then(lambda part: (1 + math.cos(math.pi * part)) / 2, step, max_lr, min_lr, warmup, total)


def linear_schedule(step: float, max_lr: float, min_lr: float, warmup: float, total: float) -> float:
    """Linear decay from `max_lr` at `warmup` to `min_lr` at `total`."""
    return _warm_then(lambda part: 1 - part, step, max_lr, min_lr, warmup, total)


def constant_schedule(step: float, max_lr: float, min_lr: float, warmup: float, total: float) -> float:
    """Constant `max_lr` after the warm-up."""
    return _warm_then(lambda part: 1.0, step, max_lr, max_lr, warmup, total)


def wsd_schedule(step: float, max_lr: float, min_lr: float, warmup: float, total: float) -> float:
    """Warmup-stable-decay: `max_lr` after the warm-up, linear decay over the last fifth of the steps."""
    start = max(warmup, (1 - DECAY_SHARE) * total)
    if step <= start:
        return constant_schedule(step, max_lr, min_lr, warmup, total)
    return linear_schedule(step, max_lr, min_lr, start, total)


SCHEDULES: dict[str, Callable[[float, float, float, float, float], float]] = {
    "cosine": cosine_schedule,
    "linear": linear_schedule,
    "wsd": wsd_schedule,
    "constant": constant_schedule,
}


def _warm_then(shape: Callable[[float], float], step: float, max_lr: float, min_lr: float, warmup: float, total: float):
    if step < warmup:
        return max_lr * step / warmup
    if step >= total:
        return min_lr
    return min_lr + (max_lr - min_lr) * shape((step - warmup) / (total - warmup))
