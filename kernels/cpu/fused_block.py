"""Fused Transformer block for CPU training: everything token-wise, as two differentiable functions.

    norm_qkv_rope    (delta, stream) → (q, k, v, stream)        join, norm, projection, rotation
    out_proj_mlp     (gathered, stream) → (delta, stream)       projection, join, norm, gated feed-forward

Op by op, each product and pass writes a tensor to memory that the next one reads. Here 64 rows at a time go through all
of them in C++ (csrc/cpu/training/token_rows.cpp), in tiles that never leave the cache, multiplied by a product of our
own at the rate of the library's. What the backward pass needs is written once; it makes the rest anew. The gradients
of weights are sums over all tokens: products of our own where those are faster (gemm.py), whose operands the tiles
leave packed, else of the library. A row's numbers do not depend on the rows beside it, nor on the number of threads.

In bfloat16 tensors are rounded where the ops round theirs; norms, gates, rotations and sums are float32.

`is_supported` says where they can stand in for a layer's ops. They need a CPU with AVX-512, and for bfloat16 one of
AMD with avx512_bf16.

B batch, T time, C width of the stream, H query heads, K key heads, D head size, J = (H + 2 K) D, F hidden features.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import op
from ..core.launch import is_real
from . import gemm, pointwise
from .pointwise import CHUNK, _native

GRAIN = 16  # widths come in multiples of a vector
HAS_FUSED_BLOCK = pointwise.HAS_NATIVE and _native.has_panels()
_PASSES = {}
if HAS_FUSED_BLOCK:
    _PASSES[torch.float32] = _native.NormQkvRope_float32, _native.OutProjMlp_float32
    if gemm.is_fast(torch.bfloat16):
        _PASSES[torch.bfloat16] = _native.NormQkvRope_bfloat16, _native.OutProjMlp_bfloat16


def is_supported(stream_BTC: Tensor, *weights: Tensor) -> bool:
    """Return whether the fused functions take this stream and a layer's weights."""
    dtype = stream_BTC.dtype
    return (
        HAS_FUSED_BLOCK
        and dtype in _PASSES
        and op._backend != "triton"
        and stream_BTC.dim() == 3
        and all(x.dtype == dtype and x.is_cpu and not any(n % gemm.GRAIN[dtype] for n in x.shape) for x in weights)
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
    """Fused residual add, RMSNorm, QKV projection and RoPE: q (B, T, H, D), k and v (B, T, K, D), new stream.

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
    """Fused output projection, residual add, RMSNorm and SwiGLU: (what the MLP adds to the stream, the stream)."""
    return _OutProjMlp.apply(gathered_BTHD, stream_BTC, output, norm_C, eps, gate_up, down)


class _NormQkvRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta_BTC, stream_BTC, norm_C, eps, qkv_JC, heads, cos, sin, positions):
        delta, stream, norm, qkv = (x.contiguous() for x in (delta_BTC, stream_BTC, norm_C, qkv_JC))
        B, T, C = stream.shape
        D = len(qkv) // (heads[0] + 2 * heads[1])
        if positions is not None:
            positions = positions.expand(B, T).long().contiguous()
        empty = partial(torch.empty, dtype=stream.dtype)
        q, k, v = (empty(B, T, count, D) for count in (*heads, heads[1]))
        kept = norm, qkv, cos, sin, positions, empty(B, T, C), torch.empty(B, T)
        ctx.numbers = *heads, eps
        ctx.save_for_backward(*kept)
        _PASSES[stream.dtype][0](*ctx.numbers, *kept).forward(delta, stream, q, k, v)
        return q, k, v, kept[5]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        kept = ctx.saved_tensors
        norm, qkv, *_, total, _ = kept
        (B, T, C), dtype = total.shape, total.dtype
        packed = ctx.needs_input_grad[4] and gemm.is_fast(dtype)
        empty = partial(gemm.room if packed else torch.empty, dtype=dtype)
        d_stream, d_norm = torch.empty_like(total), torch.empty_like(norm)
        normed, d_heads = empty(B * T, C), empty(B * T, len(qkv))
        arrived = [x.contiguous() for x in upstream]
        _PASSES[dtype][0](*ctx.numbers, *kept).backward(
            *arrived, d_stream, d_heads, normed, packed, _partial(B * T, C), d_norm
        )
        d_qkv = _weight_gradient(ctx.needs_input_grad[4], packed, B * T, d_heads, normed)  # frozen under an adapter
        return d_stream, d_stream, d_norm, None, d_qkv, None, None, None, None


class _OutProjMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathered_BTHD, stream_BTC, output, norm_C, eps, gate_up, down):
        gathered, stream, *weights = (
            x.contiguous() for x in (gathered_BTHD, stream_BTC, output, norm_C, gate_up, down)
        )
        (B, T, C), F = stream.shape, down.shape[1]
        empty = partial(torch.empty, dtype=stream.dtype)
        delta = empty(B, T, C)
        kept = *weights, empty(B, T, C), torch.empty(B * T), empty(B * T, 2 * F)
        ctx.eps = eps
        ctx.save_for_backward(gathered, *kept)
        _PASSES[stream.dtype][1](eps, *kept).forward(gathered, stream, delta)
        return delta, kept[4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_delta, d_sums):
        gathered, *kept = ctx.saved_tensors
        output, norm, _, down, *_ = kept
        (C, J), F, dtype = output.shape, down.shape[1], output.dtype
        N = gathered.numel() // J
        _, _, *wanted = ctx.needs_input_grad
        packed = any((wanted[0], *wanted[3:])) and gemm.is_fast(dtype)
        empty = partial(gemm.room if packed else torch.empty, dtype=dtype)
        d_delta, d_sums = d_delta.contiguous(), d_sums.contiguous()
        d_stream, d_gathered, d_norm = torch.empty_like(d_sums), torch.empty_like(gathered), torch.empty_like(norm)
        d_both, middle, normed = empty(N, 2 * F), empty(N, F), empty(N, C)
        by_tokens = d_delta.view(N, C), d_stream.view(N, C), gathered.view(N, J)
        if packed:
            by_tokens = empty(N, C), empty(N, C), empty(N, J)
        _PASSES[dtype][1](ctx.eps, *kept).backward(
            d_sums, d_delta, d_stream, d_gathered, d_both, middle, normed, _partial(N, C), d_norm, gathered,
            *(by_tokens if packed else (None, None, None)),
        )  # fmt: skip
        of_delta, of_stream, of_gathered = by_tokens
        d_output = _weight_gradient(wanted[0], packed, N, of_stream, of_gathered)
        d_gate_up = _weight_gradient(wanted[3], packed, N, d_both, normed)
        d_down = _weight_gradient(wanted[4], packed, N, of_delta, middle)
        return d_gathered, d_stream, d_output, d_norm, None, d_gate_up, d_down


def _partial(rows: int, C: int) -> Tensor:
    return torch.empty((rows + CHUNK - 1) // CHUNK, C)


def _weight_gradient(wanted: bool, packed: bool, N: int, left: Tensor, right: Tensor) -> Tensor | None:
    if not wanted:
        return None
    return gemm.weight_gradient(left, right, N) if packed else torch.mm(left.t(), right)
