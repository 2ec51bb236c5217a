"""Fused causal attention for CPU training, in C++ (csrc/cpu/training/dense_attention.cpp).

Register tiles that never leave the cache, and nothing above the diagonal: twice as fast as PyTorch's in float32. On a
CPU of AMD with avx512_bf16 products of bfloat16 heads are of pairs: weights and the gradients of scores are rounded
before them, 1.5 to 1.7 times as fast. Elsewhere bfloat16 is widened as it is read and rounded as it is written. Scores
are float32 always: an exponential turns the rounding of a large score into an error of percents.

B batch, T time, H query heads, K key heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pointwise

LONGEST = 4096  # the scores of 64 queries stay in the cache


def cpu_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float | None) -> Tensor | None:
    """Fused causal attention; None where PyTorch's own is to be used."""
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    if fuses(q_BTHD, k_BTKD, v_BTKD):
        return _Fused.apply(q_BTHD, k_BTKD, v_BTKD, scale)
    return None


def fuses(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the fused pass applies: float32 or bfloat16, on a CPU, head sizes of whole SIMD vectors."""
    return 1 < q.shape[1] == k.shape[1] <= LONGEST and q.shape[-1] % 16 == 0 and pointwise.is_supported(q, k, v)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHD, k_BTKD, v_BTKD, scale):
        heads = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BTKD, v_BTKD)]
        B, T, H, _ = q_BTHD.shape
        o_BTHD, stats_2BHT = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype), torch.empty(2, B, H, T)
        pointwise.attention(*heads, o_BTHD, stats_2BHT, scale)
        ctx.save_for_backward(*heads, stats_2BHT)
        ctx.scale = scale
        return o_BTHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do_BTHD):
        q, k, v, stats = ctx.saved_tensors
        do = do_BTHD if do_BTHD.stride(-1) == 1 else do_BTHD.contiguous()
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        pointwise.attention(q, k, v, do, stats, ctx.scale, *gradients)
        return *gradients, None
