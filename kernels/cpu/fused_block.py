"""A layer's rows on a CPU, in float32: all that it does with each token by itself, as two differentiable functions.

    norm_qkv_rope    (delta, stream) → (q, k, v, stream)        join, norm, projection, rotation
    out_proj_mlp     (gathered, stream) → (delta, stream)       projection, join, norm, gated feed-forward

Op by op, each product and pass writes a tensor to memory that the next one reads. Here 64 rows at a time go through all
of them in C++ (csrc/cpu/training/token_rows.cpp), in tiles that never leave the cache, multiplied by a product of our
own at the rate of the library's. What the backward pass needs is written once; it makes the rest anew. Only the
gradients of weights, sums over all tokens, are products of the library. A row's numbers do not depend on the rows
beside it, nor on the number of threads.

`is_supported` says where they can stand in for a layer's ops. They need a CPU with AVX-512.

B batch, T time, C width of the stream, H query heads, K key heads, D head size, J = (H + 2 K) D, F hidden features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import op
from ..core.launch import is_real
from . import pointwise
from .pointwise import CHUNK, _native

GRAIN = 16  # widths come in multiples of a vector
HAS_FUSED_BLOCK = pointwise.HAS_NATIVE and _native.has_panels()


def is_supported(stream_BTC: Tensor, *weights: Tensor) -> bool:
    """Can the two functions take a stream and a layer's weights?"""
    return (
        HAS_FUSED_BLOCK
        and op._backend != "triton"
        and stream_BTC.dim() == 3
        and all(x.dtype == torch.float32 and x.is_cpu and not any(n % GRAIN for n in x.shape) for x in weights)
        and stream_BTC.dtype == torch.float32
        and is_real((stream_BTC, *weights))
        and not torch.is_autocast_enabled("cpu")
    )


def norm_qkv_rope(
    delta_BTC: Tensor,
    stream_BTC: Tensor,
    norm_C: Tensor,
    eps: float,
    qkv_JC: Tensor,
    heads: tuple[int, int],
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D) of the normalized sum of `delta` and `stream`, and the sum.

    q and k are turned as by `rope`, where there are tables for it."""
    return _NormQkvRope.apply(delta_BTC, stream_BTC, norm_C, eps, qkv_JC, heads, cos, sin, positions)


def out_proj_mlp(
    gathered_BTHD: Tensor,
    stream_BTC: Tensor,
    output: Tensor,
    norm_C: Tensor,
    eps: float,
    gate_up: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute what a SwiGLU feed-forward adds to the stream that attention's heads have joined, and that stream."""
    return _OutProjMlp.apply(gathered_BTHD, stream_BTC, output, norm_C, eps, gate_up, down)


class _NormQkvRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta_BTC, stream_BTC, norm_C, eps, qkv_JC, heads, cos, sin, positions):
        delta, stream, norm, qkv = (x.contiguous() for x in (delta_BTC, stream_BTC, norm_C, qkv_JC))
        B, T, C = stream.shape
        D = len(qkv) // (heads[0] + 2 * heads[1])
        if positions is not None:
            positions = positions.expand(B, T).long().contiguous()
        q, k, v = (torch.empty(B, T, count, D) for count in (*heads, heads[1]))
        kept = norm, qkv, cos, sin, positions, torch.empty(B, T, C), torch.empty(B, T)
        ctx.numbers = *heads, eps
        ctx.save_for_backward(*kept)
        _native.NormQkvRope(*ctx.numbers, *kept).forward(delta, stream, q, k, v)
        return q, k, v, kept[5]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        kept = ctx.saved_tensors
        B, T, C = kept[5].shape
        d_stream, normed, d_heads = torch.empty(B, T, C), torch.empty(B * T, C), torch.empty(B * T, len(kept[1]))
        partial, d_norm = _room_for_norm(B * T, C)
        arrived = [x.contiguous() for x in upstream]
        _native.NormQkvRope(*ctx.numbers, *kept).backward(*arrived, d_stream, d_heads, normed, partial, d_norm)
        d_qkv = torch.mm(d_heads.t(), normed) if ctx.needs_input_grad[4] else None  # frozen under an adapter
        return d_stream, d_stream, d_norm, None, d_qkv, None, None, None, None


class _OutProjMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathered_BTHD, stream_BTC, output, norm_C, eps, gate_up, down):
        gathered, stream, *weights = (
            x.contiguous() for x in (gathered_BTHD, stream_BTC, output, norm_C, gate_up, down)
        )
        (B, T, C), F = stream.shape, down.shape[1]
        delta = torch.empty(B, T, C)
        kept = *weights, torch.empty(B, T, C), torch.empty(B * T), torch.empty(B * T, 2 * F)
        ctx.eps = eps
        ctx.save_for_backward(gathered, *kept)
        _native.OutProjMlp(eps, *kept).forward(gathered, stream, delta)
        return delta, kept[4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_delta, d_sums):
        gathered, *kept = ctx.saved_tensors
        (C, J), F = kept[0].shape, kept[3].shape[1]
        N = gathered.numel() // J
        d_delta, d_sums = d_delta.contiguous(), d_sums.contiguous()
        d_stream, d_gathered = torch.empty_like(d_sums), torch.empty(gathered.shape)
        d_both, middle, normed = torch.empty(N, 2 * F), torch.empty(N, F), torch.empty(N, C)
        partial, d_norm = _room_for_norm(N, C)
        _native.OutProjMlp(ctx.eps, *kept).backward(
            d_sums, d_delta, d_stream, d_gathered, d_both, middle, normed, partial, d_norm
        )
        _, _, output, _, _, gate_up, down = ctx.needs_input_grad
        d_output = torch.mm(d_stream.view(N, C).t(), gathered.view(N, J)) if output else None
        d_gate_up = torch.mm(d_both.t(), normed) if gate_up else None
        d_down = torch.mm(d_delta.view(N, C).t(), middle) if down else None
        return d_gathered, d_stream, d_output, d_norm, None, d_gate_up, d_down


def _room_for_norm(rows: int, C: int) -> tuple[Tensor, Tensor]:
    return torch.empty((rows + CHUNK - 1) // CHUNK, C), torch.empty(C)
