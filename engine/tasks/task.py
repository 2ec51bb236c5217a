"""Task protocol: rows generated from a seed, a question per row, a score per answer.

A row is a pure function of (seed, index), so a run that continues asks what it would have asked, and two seeds are two
sets of problems. Rows are plain dicts: a reward function gets their entries by name.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..data.corpus import Corpus

Row = dict[str, Any]
_THOUGHTS = re.compile(r"<think>.*?</think>|<[^<>]*>", re.DOTALL)


class Task(Protocol):
    """Protocol of a task."""

    @property
    def name(self) -> str: ...

    def row(self, seed: int, index: int) -> Row:
        """Row number `index` of the problems of a seed."""
        ...

    def question(self, row: Row) -> str | list[dict]:
        """The prompt: a text to continue, or messages."""
        ...

    def score(self, answer: str, row: Row) -> float:
        """Score of an answer, 1 for a right one."""
        ...


def final_answer(text: str) -> str:
    """Strip the chain of thought: `<3,7,2>2` and `<think>…</think> 2` both give 2."""
    return _THOUGHTS.sub("", text).strip()


@dataclass(frozen=True)
class GeneratedTask:
    """Task with generated rows: `make(draw, level)` gives a question, its only right answer, and perhaps the work that
    leads to it (`<…>`) and the choices."""

    name: str
    make: Callable[[random.Random, int], Row]
    level: int
    """Difficulty: of most tasks a length."""
    think: float = 0.0
    """Share of the documents that show the work."""

    def row(self, seed: int, index: int) -> Row:
        return self.make(random.Random(f"{self.name}/{self.level}/{seed}/{index}"), self.level)

    def question(self, row: Row) -> str:
        return row["question"]

    def score(self, answer: str, row: Row) -> float:
        return float(final_answer(answer) == row["answer"])

    def solved(self, documents: int, seed: int = 0) -> Iterator[tuple[str, str]]:
        """Yield questions with their answers for supervised training; a share of them shows the work."""
        for index in range(documents):
            row, draw = self.row(seed, index), random.Random(f"think/{seed}/{index}")
            yield row["question"], (row.get("work", "") if draw.random() < self.think else "") + row["answer"]

    def corpus(self, documents: int = 50_000, seed: int = 0) -> Corpus:
        """Corpus of solved problems."""
        from ..data.corpus import Corpus  # here, for it brings torch

        read = lambda: ([question + answer] for question, answer in self.solved(documents, seed))  # noqa: E731
        return Corpus(f"tasks:{self.name}:{self.level}:{self.think:g}", read)

    def write_conversations(self, path: Path, documents: int = 20_000, seed: int = 0) -> Path:
        """Write solved problems as JSON lines of prompt and completion."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for question, answer in self.solved(documents, seed):
                file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
        return path
