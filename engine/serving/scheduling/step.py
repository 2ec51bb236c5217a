"""Step plan and step result: the interface between scheduler and runner. A plan goes one way, a result the other, and
nothing else.

Both are frozen records of plain numbers. A *row* is a slot of the batch: a sequence keeps its row while it runs, so the
runner can keep what it knows of a row (its parameters, its page table, its last token) on the device.
"""

from dataclasses import dataclass
from typing import Any

UNKNOWN = -1  # stands for a token that the device has sampled or guessed, and the host has not read yet


@dataclass(frozen=True, slots=True)
class NewRow:
    """Assignment of a sequence to a batch row, with all the runner needs to compute and sample it."""

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
    """Part of one row in a step: compute `tokens` at positions `start`…, sample after each of the last `sampled`.

    All but the first of those tokens are drafts (speculative decoding).
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    sampled: int
    first_page: int  # the row's page table from this index on becomes …
    pages: tuple[int, ...]  # … these pages


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Plan of a step, executed in this order: copy pages, assign rows, compute chunks."""

    chunks: tuple[Chunk, ...]
    admitted: tuple[NewRow, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()  # (from page, to page)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability and rank of a token, and log-probabilities of the most likely ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0  # among all tokens, 1 for the most likely


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """Result of a chunk: if it samples, one token, plus one for each accepted draft."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    pooled: Any = None  # the pooled hidden states of a prompt, where its last chunk was computed: an array


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step: one `ChunkResult` for each chunk, in order."""

    chunks: tuple[ChunkResult, ...]
