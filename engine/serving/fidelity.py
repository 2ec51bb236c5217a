"""Quality of a quantized model: log-probabilities against those of the exact model on the same texts.

Two figures tell most: the root mean square of the change of a token's log-probability, and the KL divergence over the
vocabulary, which is the steadier of the two: for a model that is not biased the perplexity rises by about as much.

T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .llm import LLM

Texts = Sequence[list[int]]


def log_probabilities(llm: LLM, texts: Texts) -> list[Tensor]:
    """Log-probabilities over the whole vocabulary after each token of a text but the last: (T - 1, V) each."""
    runner: Any = llm.engine.runner
    head, given, found = runner.head, [], []

    def record(hidden: Tensor) -> Tensor:
        given.append(head(hidden))
        return given[-1]

    listening: Any = record
    listening.needs_padding = head.needs_padding
    runner.head = listening
    try:
        for text in texts:
            given.clear()
            llm.score(text)
            found.append(torch.cat(given)[: len(text) - 1].float().log_softmax(-1))
    finally:
        runner.head = head
    return found


def loss_of(llm: LLM, texts: Texts, exact: Sequence[Tensor]) -> dict[str, float]:
    """Quality loss against the exact log-probabilities: `rms`, `kl`, and relative increase of `perplexity`."""
    change, spread = [], []
    for text, a_TV, b_TV in zip(texts, exact, log_probabilities(llm, texts)):
        change.append((b_TV - a_TV).gather(1, torch.tensor(text[1:])[:, None]))
        spread.append((a_TV.exp() * (a_TV - b_TV)).sum(-1))
    change_T, spread_T = torch.cat(change).double(), torch.cat(spread).double()
    return {
        "rms": change_T.square().mean().sqrt().item(),
        "kl": spread_T.mean().item(),
        "perplexity": math.expm1(-change_T.mean().item()),
    }
