"""Reward functions: user code (FILE.py:function) or a task's score.

    def correct(prompt, completion, answer, **_):          # columns of the prompt's line by name
        return float(completion.rsplit("=", 1)[-1].strip() == answer)

A function gets those of the names it takes, or all if it has `**_`. One with the attribute `batch = True` gets lists
and returns one. Whatever goes wrong in it (an exception, no number, no end) is reported with the sample.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

RewardFunction = Callable[..., Any]
SHOWN = 200  # characters of a sample that an error shows


class RewardError(InputError):
    """A reward function failed on a sample."""


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of reward functions."""

    functions: Sequence[RewardFunction]
    weights: Sequence[float]
    seconds: float

    def __call__(self, rows: list[dict[str, Any]]) -> list[float]:
        """Rewards of samples given as dicts: `prompt`, `completion` and the columns of the prompt's row."""
        totals = [0.0] * len(rows)
        for function, weight in zip(self.functions, self.weights):
            for index, value in enumerate(self._one(function, rows)):
                totals[index] += weight * value
        return totals

    def _one(self, function: RewardFunction, rows: list[dict[str, Any]]) -> list[float]:
        if not getattr(function, "batch", False):
            return [number(self._call(function, row, row), function, row) for row in rows]
        columns = {name: [row.get(name) for row in rows] for name in rows[0]} if rows else {}
        values = list(self._call(function, columns, rows[0])) if rows else []
        if len(values) != len(rows):
            raise RewardError(f"the reward {_name(function)} gave {len(values)} values for {len(rows)} samples")
        return [number(value, function, row) for value, row in zip(values, rows)]

    def _call(self, function: RewardFunction, arguments: dict[str, Any], shown: dict[str, Any]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            names = {parameter.name for parameter in parameters}
            arguments = {name: value for name, value in arguments.items() if name in names}
        return call(function, (), arguments, self.seconds, shown)


def call(function: RewardFunction, given: tuple, named: dict[str, Any], seconds: float, shown: dict[str, Any]) -> Any:
    """Call a user's function with a time limit; any failure becomes one sentence that shows the sample."""
    try:
        with time_limit(seconds):
            return function(*given, **named)
    except _TimeUpError:
        said = f"took longer than reward_seconds={seconds:g}"
    except Exception as error:
        said = f"failed: {type(error).__name__}: {error}"
    raise RewardError(f"the reward {_name(function)} {said}; the sample: {_show(shown)}")


def open_rewards(names: Sequence[str], weights: Sequence[float], seconds: float) -> Rewards:
    """Import the reward functions FILE.py:function."""
    return Rewards([load_function(name) for name in names], weights or [1.0] * len(names), seconds)


def load_function(name: str) -> Callable[..., Any]:
    """Import the object FILE.py:name."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function:
        raise InputError(f"reward {name!r} must be FILE.py:function")
    if not Path(path).is_file():
        raise InputError(f"reward {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"reward {name!r}: {path} could not be run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"reward {name!r}: {path} has no function {function}")
    return found


class _TimeUpError(BaseException):
    """Time limit of user code exceeded; no Exception, which the code's own `except` might swallow."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after so many seconds (main thread only, where the system has SIGALRM)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again, should the block have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def number(value: Any, function: RewardFunction, row: dict[str, Any]) -> float:
    """Check that a reward is a finite number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise RewardError(f"the reward {_name(function)} gave {value!r}, not a finite number; the sample: {_show(row)}")
    return found


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", repr(function))


def _show(row: dict[str, Any]) -> str:
    prompt, completion = (str(row[name]) for name in ("prompt", "completion"))
    prompt = prompt if len(prompt) <= SHOWN else f"…{prompt[-SHOWN:]}"
    completion = completion if len(completion) <= SHOWN else f"{completion[:SHOWN]}…"
    return f"{prompt!r} → {completion!r}"
