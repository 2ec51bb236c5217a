"""Step plan and result: all that crosses the line between scheduler and runner: a plan one way, a result the other, and
nothing else.

Both are frozen records of plain numbers. A *row* is a slot of the batch: a sequence keeps its row while it runs, so the
runner can keep what it knows of a row (its parameters, its page table, its last token) on the device.
"""

from dataclasses import dataclass
from typing import Any

UNKNOWN = -1  # stands for a token that the device has sampled or guessed, and the host has not read yet


@dataclass(frozen=True, slots=True)
class NewRow:
    """Assignment of a sequence to a row of the batch, with what the runner needs to compute and sample it."""

    row: int
    params: Any
    seed: int
    tokens: tuple[int, ...]
    prompt_length: int
    grammar: Any = None
    adapter: str | None = None
    pooling: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row's part of a step: compute `tokens` at positions `start`…, and sample after each of the last `sampled`.

    All but the first of those are drafts: guesses at what the sample before them will be.
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    sampled: int
    first_page: int  # the row's page table from this index on becomes …
    pages: tuple[int, ...]  # … these pages


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Plan of a step for the runner, in this order: copy pages, take in rows, compute chunks."""

    chunks: tuple[Chunk, ...]
    admitted: tuple[NewRow, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()  # (from page, to page)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token and its rank, and the log-probabilities of the most likely ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0  # among all tokens, 1 for the most likely


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """Result of a chunk: if it samples, one token, and one more for each draft that proved right."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    pooled: Any = None  # the pooled hidden states of a prompt, where its last chunk was computed: an array


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `ChunkResult` for each chunk of the plan, in its order."""

    chunks: tuple[ChunkResult, ...]
