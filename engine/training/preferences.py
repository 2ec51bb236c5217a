"""Preference tuning: DPO (Rafailov et al., 2023) and IPO (Azar et al., 2023) on pairs of answers.

    score     log p(answer) − log p₀(answer), p₀ the model before its first step
    margin    score of the chosen answer − score of the rejected one
    DPO       −log σ(β · margin)
    IPO       (margin − 1 / 2β)², of scores a token

What p₀ thinks is computed once, before the first step, so that one model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...tokenizer.sources import atomic_writer
from ..data.loader import IGNORE
from ..data.pairs import PairBatch, PreferencePairs
from ..model import Losses, Transformer


@dataclass(frozen=True, slots=True)
class PairEvaluation:
    """Evaluation of preferences: loss, accuracy and reward margin over pairs."""

    loss: float
    accuracy: float
    """Share of pairs with a positive margin."""
    margin: float
    tokens: int
    """Pairs that were read."""
    bits_per_byte: None = None

    def figures(self) -> dict[str, float]:
        """Metrics by name, as logged."""
        return {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_margin": self.margin}

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.3f}, margin {self.margin:.3f}"


def answer_log_probs(model: Transformer, batch: PairBatch) -> Tensor:
    """Log-probability of each answer (B, 2)."""
    flat = (x.flatten(0, 1) for x in (batch.tokens_BT, batch.targets_BT))
    return model.log_probs(*flat).float().sum(-1).view(-1, 2)


def margins(model: Transformer, batch: PairBatch) -> Tensor:
    """Implicit reward margin of each pair: policy log-ratio minus reference log-ratio, chosen over rejected."""
    scores_B2 = answer_log_probs(model, batch) - batch.reference_B2
    if batch.kind == "ipo":
        scores_B2 = scores_B2 / (batch.targets_BT != IGNORE).sum(-1)
    return scores_B2[:, 0] - scores_B2[:, 1]


def pair_losses(margins_B: Tensor, kind: str, beta: float) -> Tensor:
    """DPO or IPO loss of each pair."""
    return -F.logsigmoid(beta * margins_B) if kind == "dpo" else (margins_B - 1 / (2 * beta)).square()


def preference_losses(model: Transformer, batch: PairBatch) -> Losses:
    """Mean DPO or IPO loss of a batch of pairs."""
    loss = pair_losses(margins(model, batch), batch.kind, batch.beta).mean()
    return Losses(loss, loss)


@torch.no_grad()
def reference_log_probs(model: Transformer, pairs: PreferencePairs, rows: int) -> Tensor:
    """Reference log-probabilities of all answers (pairs, 2), `rows` pairs at a time."""
    count, found = len(pairs.pairs), []
    for start in range(0, count, rows):
        batch = pairs.take(np.arange(start, min(start + rows, count))).to(model.device)
        found.append(answer_log_probs(model, batch).cpu())
    return torch.cat(found)


def add_reference(model: Transformer, pairs: PreferencePairs, rows: int, path: Path, keep: bool, reuse: bool) -> None:
    """Compute the reference log-probabilities, or read those the run began with; `keep` saves them."""
    shape = (len(pairs.pairs), 2)
    if reuse and path.is_file():
        held = np.load(path, allow_pickle=False)
        if held.shape == shape:
            pairs.reference = torch.from_numpy(held)
            return
    pairs.reference = reference_log_probs(model, pairs, rows)
    if keep:
        with atomic_writer(path) as file:
            np.save(file, pairs.reference.numpy())


@torch.no_grad()
def evaluate_pairs(model: Transformer, batches: Iterable[PairBatch]) -> PairEvaluation:
    """Loss, accuracy and margin over pairs."""
    was_training = model.training
    model.eval()
    found = [(margins(model, batch.to(model.device)).cpu(), batch) for batch in batches]
    model.train(was_training)
    losses = torch.cat([pair_losses(each, batch.kind, batch.beta) for each, batch in found]).double()
    every = torch.cat([each for each, _ in found]).double()
    return PairEvaluation(float(losses.mean()), float((every > 0).double().mean()), float(every.mean()), len(every))


def every_pair(pairs: PreferencePairs, limit: int = 0) -> Iterable[PairBatch]:
    """All pairs in order, or `limit` batches spread evenly over them."""
    rows = np.arange(len(pairs.pairs))
    if limit and len(rows) > limit * pairs.batch_size:
        rows = np.linspace(0, len(rows) - 1, limit * pairs.batch_size).astype(int)
    for start in range(0, len(rows), pairs.batch_size):
        yield pairs.take(rows[start : start + pairs.batch_size])
