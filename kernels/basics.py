"""SiLU, softmax and scaled dot-product attention in plain PyTorch, for learners.

Nothing here is fused: `attention` and `cross_entropy` are what a model calls. These are what a learner reads first.
"""

import math

import torch


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU (swish): x · σ(x), a smooth ReLU that lets a little of the negative side through."""
    return x * torch.sigmoid(x)


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Softmax along `dim`: positive numbers that sum to one, proportional to exp(x).

    The maximum is subtracted first: it cancels in the ratio, and no exponential can overflow.
    """
    exps = torch.exp(x - x.amax(dim, keepdim=True))
    return exps / exps.sum(dim, keepdim=True)


def scaled_dot_product_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled dot-product attention, softmax(q kᵀ / √d) v; `mask` is True where a query may see a key."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return softmax(scores) @ v
