"""Causal attention for training on a CPU, a way for each number format.

In float32 it is one fused pass in C++ (csrc/cpu/training/dense_attention.cpp): register tiles that never leave the
cache, nothing above the diagonal, twice as fast as PyTorch's.

In bfloat16 it is plain matrix products over a staircase of blocks. A fused kernel wins when the table of scores does
not fit the cache. At the few hundred tokens that a CPU trains on it fits, and then the matrix units decide: a block of
queries times all keys up to its end is one large product, which the library runs at its full bfloat16 rate, in the
backward pass too. The probabilities of the blocks are kept for the backward pass; `LONGEST` bounds that memory. Scores
alone are made in float32: an exponential turns the rounding of a large score into an error of percents.

B batch, T time, H query heads, K key heads, G = H / K, D head dim, R = B·K rows of the batched products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pointwise

LONGEST = 512
LONGEST_FUSED = 4096  # the fused pass keeps 64 queries' scores in the cache
BLOCK = 64


def cpu_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float | None) -> Tensor | None:
    """softmax(q · k · scale) v, each query over the keys up to its own; None where PyTorch's own attention is to."""
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    if fuses(q_BTHD, k_BTKD, v_BTKD):
        return _Fused.apply(q_BTHD, k_BTKD, v_BTKD, scale)
    if use_blocked(q_BTHD, k_BTKD):
        return _BlockedAttention.apply(q_BTHD, k_BTKD, v_BTKD, scale)
    return None


def fuses(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Is this a call that the fused pass is for: float32, on a CPU, heads of whole vectors?"""
    return (
        q.dtype == torch.float32
        and 1 < q.shape[1] == k.shape[1] <= LONGEST_FUSED
        and q.shape[-1] % 16 == 0
        and pointwise.serves(q, k, v)
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHD, k_BTKD, v_BTKD, scale):
        heads = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BTKD, v_BTKD)]
        B, T, H, _ = q_BTHD.shape
        o_BTHD, stats_2BHT = torch.empty(q_BTHD.shape), torch.empty(2, B, H, T)
        pointwise.attention(*heads, o_BTHD, stats_2BHT, scale)
        ctx.save_for_backward(*heads, stats_2BHT)
        ctx.scale = scale
        return o_BTHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do_BTHD):
        q, k, v, stats = ctx.saved_tensors
        do = do_BTHD if do_BTHD.stride(-1) == 1 else do_BTHD.contiguous()
        gradients = [torch.empty(x.shape) for x in (q, k, v)]
        pointwise.attention(q, k, v, do, stats, ctx.scale, *gradients)
        return *gradients, None


def use_blocked(q: Tensor, k: Tensor) -> bool:
    """Is this a call that the staircase is for: training, bfloat16, on a CPU, a short square?"""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and 1 < q.shape[1] == k.shape[1] <= LONGEST
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad)
        and not torch.compiler.is_compiling()
    )


def _steps(T: int):
    return [(start, min(T, start + BLOCK)) for start in range(0, T, BLOCK)]


def _by_key_head(x_BTHD: Tensor, K: int) -> Tensor:
    """(B, T, H, D) → (B·K, G, T, D): the query heads that share a key head side by side."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B * K, H // K, T, D)


def _by_token(x_RGTD: Tensor, B: int) -> Tensor:
    R, G, T, D = x_RGTD.shape
    return x_RGTD.view(B, R // B, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, R // B * G, D)


def _weights(scores_RGnS: Tensor, scale: float) -> Tensor:
    n, S = scores_RGnS.shape[-2:]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores_RGnS[..., S - n :].masked_fill_(future, float("-inf"))
    return torch.softmax(scores_RGnS.mul_(scale), -1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHD, k_BTKD, v_BTKD, scale):
        B, T, _, D = q_BTHD.shape
        K = k_BTKD.shape[2]
        q = _by_key_head(q_BTHD, K)
        k, v = (_by_key_head(x, K)[:, 0] for x in (k_BTKD, v_BTKD))
        R, G = q.shape[:2]
        o, kept = torch.empty_like(q), []
        wide_q, wide_k, native = q.float(), k.float(), pointwise.serves(q)
        for start, end in _steps(T):
            n = end - start
            scores = torch.bmm(wide_q[:, :, start:end].reshape(R, G * n, D), wide_k[:, :end].mT)
            if native:
                weights = torch.empty_like(scores, dtype=q.dtype)
                pointwise.attend(scores, weights, n, scale)
            else:
                weights = _weights(scores.view(R, G, n, end), scale).to(q.dtype).view(R, G * n, end)
            o[:, :, start:end] = torch.bmm(weights, v[:, :end]).view(R, G, n, D)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.native = scale, native
        return _by_token(o, B)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do_BTHD):
        q, k, v, *kept = ctx.saved_tensors
        R, G, T, D = q.shape
        B = len(do_BTHD)
        do = _by_key_head(do_BTHD.contiguous(), R // B)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), weights in zip(_steps(T), kept):
            n = end - start
            upstream = do[:, :, start:end].reshape(R, G * n, D)
            dv[:, :end].baddbmm_(weights.mT, upstream)
            d_weights = torch.bmm(upstream, v[:, :end].mT)
            if ctx.native:
                d_scores = d_weights
                pointwise.unattend(weights, d_weights, n, ctx.scale)
            else:
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype) * ctx.scale
            dq[:, :, start:end] = torch.bmm(d_scores, k[:, :end]).view(R, G, n, D)
            dk[:, :end].baddbmm_(d_scores.mT, q[:, :, start:end].reshape(R, G * n, D))
        return (
            _by_token(dq, B),
            _by_token(dk[:, None], B),
            _by_token(dv[:, None], B),
            None,
        )
