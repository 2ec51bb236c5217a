"""Fused QK norm, RoPE and KV-cache write of a serving step, in one pass over q, k and v.

Normalize the heads of q and k (Qwen3 and kin; without weights this step is left out), rotate them by their positions,
put k and v into the paged cache, return q. One after the other these are four kernels that read and write k three
times; together each of q, k and v is read once and written once. For pages of 8 bits heads of q and k go through
`hadamard` as well, between rotation and rounding. Serving only: there is no gradient.

T tokens, H query heads, K key heads, D head dim, R = half the rotary dim, P pages.
"""

import torch

from .core.lang import next_power_of_2, tl, triton
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .hadamard import hadamard, transformed
from .rms_norm import rms_norm
from .rope import angles_of, rope, rotate
from .write_pages import check_pages, page_limit, page_scales, store_heads, write_pages


def _qk_norm_rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    eps: float = 1e-6,
    interleaved: bool = False,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalize and rotate q (T, H, D) and k; write k and v (T, K, D) to `slots` (T,) of the pages, in place.

    `cos` and `sin` are tables of `rope_tables`, `positions` (T,) their rows; negative slots are padding. With
    pages of 8 bits, which have scales (P, K, page), q is transformed for the product with what they hold.
    """
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm.reference(q, q_weight, eps), rms_norm.reference(k, k_weight, eps)
    q, k = rope.reference(q, k, cos, sin, positions, interleaved)
    write_pages.reference(k, v, k_pages, v_pages, slots, k_scales, v_scales)
    return q if k_scales is None else hadamard.reference(q, back=True)


# ---- fused ----


@triton.jit
def _prepare_heads(
    x_ptr, weight_ptr, y_ptr, scales_ptr, slot, heads, x_head, x_dim, cos, sin, write,
    eps: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRANSFORM: tl.constexpr, BACK: tl.constexpr, LIMIT: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Norm, RoPE, Hadamard transform (with TRANSFORM) and cache write of all heads of one token."""
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    pair = tl.arange(0, HALF).to(tl.int64)[None, :]
    a_col, b_col = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + R)
    mask = (head < heads) & (pair < R)
    a = tl.load(x_ptr + head * x_head + a_col * x_dim, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * x_head + b_col * x_dim, mask=mask, other=0.0).to(tl.float32)
    if REST > 0:
        rest_col = 2 * R + tl.arange(0, REST).to(tl.int64)[None, :]
        rest_mask = (head < heads) & (rest_col < D)
        rest = tl.load(x_ptr + head * x_head + rest_col * x_dim, mask=rest_mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a + b * b, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / D + eps)[:, None]
        a *= inverse * tl.load(weight_ptr + a_col, mask=pair < R, other=0.0).to(tl.float32)
        b *= inverse * tl.load(weight_ptr + b_col, mask=pair < R, other=0.0).to(tl.float32)
        if REST > 0:
            rest *= inverse * tl.load(weight_ptr + rest_col, mask=rest_col < D, other=0.0).to(tl.float32)
    a, b = rotate(a, b, cos, sin)
    if TRANSFORM:
        col = tl.broadcast_to(tl.arange(0, WHOLE)[None, :], [HEADS, WHOLE])
        place = tl.minimum(col // 2 if INTERLEAVED else col % R, R - 1)
        second = col % 2 == 1 if INTERLEAVED else col >= R
        x = tl.where(second, tl.gather(b, place, 1), tl.gather(a, place, 1))
        if REST > 0:
            x = tl.where(col < 2 * R, x, tl.gather(rest, tl.minimum(tl.maximum(col - 2 * R, 0), REST - 1), 1))
        x = transformed(tl.where(col < D, x, 0.0), D, BACK, HEADS, WHOLE)
        store_heads(x, y_ptr, scales_ptr, slot, heads, write, D, LIMIT, PAGE, HEADS, WHOLE)
    else:
        mask, y_row = mask & write, y_ptr + (slot * heads + head) * D
        tl.store(y_row + a_col, a.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_row + b_col, b.to(y_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            tl.store(y_row + rest_col, rest.to(y_ptr.dtype.element_ty), mask=rest_mask & write)


@triton.jit
def qk_norm_rope_kv_write_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    q_out_ptr, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr,
    q_heads, k_heads, q_token, q_head, q_dim, k_token, k_head, k_dim, v_token, v_head, v_dim, table_row,
    eps: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, PAGE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One token; with LIMIT (8-bit pages), heads are Hadamard-transformed and keys and values get scales."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    cos, sin = angles_of(cos_ptr, sin_ptr, tl.load(position_ptr + token), table_row, R, HALF)
    _prepare_heads(
        q_ptr + token * q_token, q_weight_ptr, q_out_ptr, k_scales_ptr, token, q_heads, q_head, q_dim, cos, sin, True,
        eps, D, R, NORM, INTERLEAVED, LIMIT > 0, 1, 0.0, PAGE, Q_HEADS, HALF, REST, WHOLE,
    )  # fmt: skip
    _prepare_heads(
        k_ptr + token * k_token, k_weight_ptr, k_pages_ptr, k_scales_ptr,
        slot, k_heads, k_head, k_dim, cos, sin, slot >= 0,
        eps, D, R, NORM, INTERLEAVED, LIMIT > 0, 0, LIMIT, PAGE, K_HEADS, HALF, REST, WHOLE,
    )  # fmt: skip
    head, col = tl.arange(0, K_HEADS).to(tl.int64)[:, None], tl.arange(0, WHOLE).to(tl.int64)[None, :]
    mask = (head < k_heads) & (col < D) & (slot >= 0)
    v = tl.load(v_ptr + token * v_token + head * v_head + col * v_dim, mask=mask, other=0.0).to(tl.float32)
    store_heads(v, v_pages_ptr, v_scales_ptr, slot, k_heads, slot >= 0, D, LIMIT, PAGE, K_HEADS, WHOLE)


@launcher(mutates=("k_pages", "v_pages", "k_scales", "v_scales"))
def qk_norm_rope_write_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    eps: float,
    interleaved: bool,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> torch.Tensor:
    (T, H, D), K, R = q.shape, k.shape[1], cos.shape[-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norm = q_weight is not None
    cos, sin = cos.contiguous(), sin.contiguous()
    width = next_power_of_2(D)
    launch(
        qk_norm_rope_kv_write_kernel, (T,),
        q, k, v, q_weight if norm else q, k_weight if norm else k, cos, sin, positions, slots, out, k_pages, v_pages,
        k if k_scales is None else k_scales, v if v_scales is None else v_scales,
        H, K, *q.stride(), *k.stride(), *v.stride(), cos.stride(0),
        eps=eps, D=D, R=R, NORM=norm, INTERLEAVED=interleaved, LIMIT=page_limit(k_pages.dtype),
        PAGE=k_pages.shape[1],
        Q_HEADS=next_power_of_2(H), K_HEADS=next_power_of_2(K),
        HALF=next_power_of_2(R), REST=next_power_of_2(D - 2 * R) if D > 2 * R else 0, WHOLE=width,
        num_warps=max(1, min(8, next_power_of_2(H) * width // 1024)),
    )  # fmt: skip
    return out


def _qk_norm_rope_write_fused(
    q, k, v, q_weight, k_weight, cos, sin, positions, k_pages, v_pages, slots, eps=1e-6, interleaved=False,
    k_scales=None, v_scales=None,
):  # fmt: skip
    check_pages("qk_norm_rope_write", k_pages, v_pages, k_scales, v_scales)
    return qk_norm_rope_write_launch(
        q, k, v, q_weight, k_weight, cos, sin, positions, k_pages, v_pages, slots, eps, interleaved, k_scales, v_scales
    )


def _batch(m, T, H, K, D, R, P, page, norm=True, page_dtype=None):
    q, k, v = m.normal(T, H, D, grad=False), m.normal(T, K, D, grad=False), m.normal(T, K, D, grad=False)
    weights = (m.normal(D, grad=False), m.normal(D, grad=False)) if norm else (None, None)
    cos, sin = (m.normal(64, R, dtype=torch.float32, grad=False) for _ in range(2))
    pages = [torch.zeros(P, page, K, D, dtype=page_dtype or m.dtype, device=m.device) for _ in range(2)]
    slots = torch.randperm(P * page, generator=m.generator)[:T].to(m.device)
    slots[T // 2 : T // 2 + 1] = -1
    return (
        q,
        k,
        v,
        *weights,
        cos,
        sin,
        m.integers(0, 64, T),
        *pages,
        slots,
        page_scales(m, *pages) if page_dtype else {},
    )


qk_norm_rope_write = Op(
    name="qk_norm_rope_write",
    reference=_qk_norm_rope_write,
    fused=_qk_norm_rope_write_fused,
    shapes="q T H D, k T K D, v T K D, q_weight D, k_weight D, cos rows R, sin rows R, positions T, "
    "k_pages P page K D, v_pages P page K D, slots T, k_scales P K page, v_scales P K page",
    mutates=("k_pages", "v_pages", "k_scales", "v_scales"),
    cases=[
        Case("grouped heads", lambda m: _batch(m, 5, 4, 2, 32, 16, 3, 4)),
        Case("without norm", lambda m: _batch(m, 5, 4, 2, 32, 16, 3, 4, norm=False)),
        Case("interleaved, part of the head", lambda m: _batch(m, 4, 3, 1, 24, 8, 3, 4), {"interleaved": True}),
        Case("int8 pages", lambda m: _batch(m, 5, 4, 2, 32, 16, 3, 4, page_dtype=torch.int8)),
        Case("float8 pages, two sizes", lambda m: _batch(m, 5, 4, 2, 24, 12, 3, 4, page_dtype=torch.float8_e4m3fn)),
        Case(
            "interleaved, part of the head, int8 pages",
            lambda m: _batch(m, 4, 3, 1, 24, 8, 3, 4, page_dtype=torch.int8),
            {"interleaved": True},
        ),
        Case("8192 tokens, 32 and 8 heads of 128", lambda m: _batch(m, 8192, 32, 8, 128, 64, 1024, 16), bench=True),
        Case(
            "8192 tokens, 32 and 8 heads of 128, int8 pages",
            lambda m: _batch(m, 8192, 32, 8, 128, 64, 1024, 16, page_dtype=torch.int8),
            bench=True,
        ),
    ],
    traffic=lambda q, k, v, *_, **__: (2 * (q.nbytes + k.nbytes + v.nbytes), 0),
    budget=Budget(registers=96, vector=True),
)
