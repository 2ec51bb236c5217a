"""Preference pairs for DPO: batches of chosen and rejected answers with reference log-probabilities.

In the token files a pair is two documents, the chosen one and then the rejected one. A row of a batch is a pair, and
holds the log-probabilities of both answers by the reference (the model before its first step), which are computed once
for the whole split.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .loader import IGNORE, Batch, _Rows
from .tokens import TokenSplit

LANES = 16  # rows are padded to a multiple of this many tokens, a SIMD vector


@dataclass(frozen=True, slots=True)
class PairBatch(Batch):
    """Inputs and targets (B, 2, T) of chosen and rejected answers; targets outside of answers are IGNORE."""

    reference_B2: Tensor | None = None
    """The log-probability of each answer by the reference."""
    kind: str = "dpo"
    beta: float = 0.1

    @property
    def weight(self) -> Tensor:
        return torch.tensor(len(self.tokens_BT))

    def rows(self, start: int, stop: int) -> PairBatch:
        reference = None if self.reference_B2 is None else self.reference_B2[start:stop]
        return replace(
            self,
            tokens_BT=self.tokens_BT[start:stop],
            targets_BT=self.targets_BT[start:stop],
            reference_B2=reference,
        )

    def to(self, device: torch.device) -> PairBatch:
        moved = {name: getattr(self, name).to(device) for name in ("tokens_BT", "targets_BT")}
        reference = None if self.reference_B2 is None else self.reference_B2.to(device)
        return replace(self, **moved, reference_B2=reference)


@dataclass
class PreferencePairs(_Rows):
    """Loader of preference pairs, each once an epoch. Answers longer than the context are truncated."""

    split: TokenSplit
    batch_size: int
    context: int
    seed: int = 0
    shuffle: bool = True
    kind: str = "dpo"
    beta: float = 0.1
    reference: Tensor | None = None
    """Log-probabilities (pairs, 2) of the answers, once they are known."""
    pairs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        if self.split.learn is None:
            raise InputError("preference pairs need conversations: this data does not say which tokens are learned")
        self.learn = self.split.learn
        edges = np.append(self.split.starts, len(self.split))
        self.spans = [(int(start), int(min(end, start + self.context + 1))) for start, end in itertools.pairwise(edges)]
        learned = [bool(np.any(self.learn[start + 1 : end])) for start, end in self.spans]
        self.pairs = [pair for pair in range(len(self.spans) // 2) if learned[2 * pair] and learned[2 * pair + 1]]
        if not self.pairs:
            raise InputError(f"no preference pair fits a context of {self.context} tokens: prompts alone fill it")

    def count(self, epoch: int) -> int:
        return len(self.pairs)

    def batch(self, step: int) -> PairBatch:
        return self.take(self.row_numbers(step))

    def take(self, rows: np.ndarray) -> PairBatch:
        """Batch of the pairs with these row numbers."""
        spans = [self.spans[2 * self.pairs[row] + side] for row in rows for side in (0, 1)]
        T = -(-max(end - start - 1 for start, end in spans) // LANES) * LANES
        tokens, targets = np.zeros((len(spans), T), np.int64), np.full((len(spans), T), IGNORE, np.int64)
        for number, (start, end) in enumerate(spans):
            text = np.asarray(self.split.tokens[start:end], np.int64)
            learned = self.learn[start + 1 : end] > 0
            tokens[number, : len(text) - 1] = text[:-1]
            targets[number, : len(text) - 1][learned] = text[1:][learned]
        both = (torch.from_numpy(array).view(len(rows), 2, T) for array in (tokens, targets))
        reference = None if self.reference is None else self.reference[torch.from_numpy(np.asarray(rows))]
        return PairBatch(*both, reference_B2=reference, kind=self.kind, beta=self.beta)
