"""Prompts of an RL run, a pure function of (seed, step), and the seeds of their samples."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.loader import generator
from ..data.sources import expand
from ..data.text_files import read_rows
from ..errors import InputError
from ..tasks import PREFIX, Task, open_task

Row = dict[str, Any]


def encode_prompt(llm: Any, prompt: str | list[dict]) -> list[int]:
    """Tokenize a prompt. A string becomes a user message if the model has a chat template."""
    if isinstance(prompt, str) and getattr(llm.tokenizer, "chat_template", None):
        prompt = [{"role": "user", "content": prompt}]
    return llm.encode(prompt) if isinstance(prompt, str) else llm.encode_chat(prompt)


def sample_seed(*numbers: int) -> int:
    """Sampling seed of a prompt: a function of (seed, step, row).

    Noise is keyed by (seed, position): prompts of one length that shared a seed would all roll the same dice.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, epoch).permutation(count)


@dataclass(frozen=True)
class Prompts:
    """Prompt dataset: rows of a file, shuffled once an epoch, or fresh problems of a task."""

    source: str
    rows: list[Row] | Task
    seed: int

    @property
    def task(self) -> Task | None:
        return None if isinstance(self.rows, list) else self.rows

    @property
    def sha256(self) -> str:
        """Hash of the prompts; a resumed run must find the same."""
        told = self.source if self.task else json.dumps(self.rows, sort_keys=True)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return 0 if self.task else len(self.rows)

    def row(self, number: int) -> Row:
        """Prompt `number` of the run, with the row's other columns; epochs follow one another."""
        if self.task:
            row = self.task.row(self.seed, number)
            return {**row, "prompt": self.task.question(row)}
        epoch, place = divmod(number, len(self.rows))
        return self.rows[_order(self.seed, epoch, len(self.rows))[place]]


def open_prompts(source: str, seed: int) -> Prompts:
    """Open the prompts of `tasks:NAME`, or of JSON lines with a `prompt` (a string or messages)."""
    if source.startswith(PREFIX):
        return Prompts(source, open_task(source), seed)
    rows = []
    for path in expand([source]):
        for line, row in read_rows(path):
            prompt = row.get("prompt") if isinstance(row, dict) else None
            if not prompt or not isinstance(prompt, (str, list)):
                raise InputError(f'{line} needs a "prompt", a text or a list of messages: {json.dumps(row)[:200]}')
            rows.append(row)
    if not rows:
        raise InputError(f"{source} holds no prompt")
    return Prompts(str(Path(source)), rows, seed)
