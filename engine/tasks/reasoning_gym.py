"""Tasks of the package reasoning-gym: about a hundred generators with their own scoring."""

from __future__ import annotations

from importlib import import_module

from ..errors import InputError
from .task import Row, final_answer


class ReasoningGymTask:
    """One dataset of reasoning-gym; rows are generated from (seed, index) on demand."""

    def __init__(self, name: str) -> None:
        try:
            reasoning_gym = import_module("reasoning_gym")
        except ImportError as error:
            raise InputError(
                f"tasks:reasoning-gym/{name} needs the package reasoning-gym: pip install 'warploom[tasks]'"
            ) from error
        self.name, self._create = f"reasoning-gym/{name}", reasoning_gym.create_dataset
        try:
            self._scorer = self._create(name, seed=0, size=1)
        except ValueError as error:
            known = ", ".join(sorted(reasoning_gym.factory.DATASETS))
            raise InputError(f"reasoning-gym has no task {name!r}; it has: {known}") from error

    def row(self, seed: int, index: int) -> Row:
        return dict(self._create(self.name.partition("/")[2], seed=seed, size=index + 1)[index])

    def question(self, row: Row) -> list[dict]:
        return [{"role": "user", "content": row["question"]}]

    def score(self, answer: str, row: Row) -> float:
        return float(self._scorer.score_answer(final_answer(answer), row))
