"""Attention sinks: a learned logit a head that takes its share of the softmax and gives nothing (gpt-oss).

With a sink s the weights become exp(x_i) / (exp(s) + Σ exp(x_j)), which is plain attention times σ(lse − s), where lse
is the log-sum-exp of the scores. So any attention stays as it is, and its result is scaled. Here lse is computed a
second time, from a table of scores: correct everywhere, at the memory of that table.

B batch, T queries, S keys, H query heads, K key heads, G = H / K, D head dim.
"""

import math

import torch

from .attention import attention, visible
from .core.lang import wide


def attention_with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, S, K, D) with a sink a head (H,)."""
    gathered = attention(q, k, v, window=window, softcap=softcap, scale=scale)
    sums = log_sums(q, k, window, softcap, scale)
    return gathered * torch.sigmoid(sums - sinks.to(sums.dtype)).unsqueeze(-1).to(q.dtype)


def log_sums(q, k, window, softcap, scale) -> torch.Tensor:
    """(B, T, H): the log of what a query's softmax divides by."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    q_BKGTD = q.to(wide(q)).transpose(1, 2).reshape(B, K, H // K, T, D)
    scores = q_BKGTD @ k.to(wide(k)).permute(0, 2, 3, 1).unsqueeze(2) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(T, S, True, window, q.device), -math.inf)
    return torch.logsumexp(scores, -1).flatten(1, 2).transpose(1, 2)
