"""Everything that serving does to q, k and v between their projection and attention, in one pass.

Normalize the heads of q and k (Qwen3 and kin; without weights this step is left out), rotate them by their positions,
put k and v into the paged cache, return q. One after the other these are four kernels that read and write k three
times; together each of q, k and v is read once and written once. Serving only: there is no gradient.

T tokens, H query heads, K key heads, D head dim, R = half the rotary dim, P pages.
"""

import torch

from .core.lang import next_power_of_2, tl, triton
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .rms_norm import rms_norm
from .rope import angles_of, rope, rotate
from .write_pages import page_limit, saturate, scaled, write_pages


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (T, H, D) normalized and rotated; k likewise and v (T, K, D) go to `slots` (T,) of the pages, in place.

    `cos` and `sin` are tables of `rope_tables`, `positions` (T,) their rows; negative slots are padding. Pages hold
    k / `k_scale` and v / `v_scale` (K,), if these are given.
    """
    if q_weight is not None:
        q, k = rms_norm.reference(q, q_weight, eps), rms_norm.reference(k, k_weight, eps)
    q, k = rope.reference(q, k, cos, sin, positions, interleaved)
    write_pages.reference(k, v, k_pages, v_pages, slots, k_scale, v_scale)
    return q


# ---- fused ----


@triton.jit
def _prepare_heads(
    x_ptr, weight_ptr, y_ptr, scale_ptr, heads, x_head, x_dim, cos, sin, write,
    eps: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, SCALED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, normalized, rotated and stored."""
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
    a, b = scaled(a, scale_ptr, head, head < heads, SCALED), scaled(b, scale_ptr, head, head < heads, SCALED)
    mask, y_row = mask & write, y_ptr + head * D
    tl.store(y_row + a_col, saturate(a, LIMIT).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_row + b_col, saturate(b, LIMIT).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        rest = scaled(rest, scale_ptr, head, head < heads, SCALED)
        tl.store(y_row + rest_col, saturate(rest, LIMIT).to(y_ptr.dtype.element_ty), mask=rest_mask & write)


@triton.jit
def qk_norm_rope_kv_write_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    q_out_ptr, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr,
    q_heads, k_heads, q_token, q_head, q_dim, k_token, k_head, k_dim, v_token, v_head, v_dim, table_row,
    eps: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    cos, sin = angles_of(cos_ptr, sin_ptr, tl.load(position_ptr + token), table_row, R, HALF)
    _prepare_heads(
        q_ptr + token * q_token, q_weight_ptr, q_out_ptr + token * q_heads * D, k_scale_ptr,
        q_heads, q_head, q_dim, cos, sin, True,
        eps, D, R, NORM, INTERLEAVED, 0.0, False, Q_HEADS, HALF, REST,
    )  # fmt: skip
    place = slot * k_heads * D
    _prepare_heads(
        k_ptr + token * k_token, k_weight_ptr, k_pages_ptr + place, k_scale_ptr,
        k_heads, k_head, k_dim, cos, sin, slot >= 0,
        eps, D, R, NORM, INTERLEAVED, LIMIT, K_SCALED, K_HEADS, HALF, REST,
    )  # fmt: skip
    head, col = tl.arange(0, K_HEADS).to(tl.int64)[:, None], tl.arange(0, WHOLE).to(tl.int64)[None, :]
    mask = (head < k_heads) & (col < D) & (slot >= 0)
    v = tl.load(v_ptr + token * v_token + head * v_head + col * v_dim, mask=mask, other=0.0).to(tl.float32)
    v = scaled(v, v_scale_ptr, head, head < k_heads, V_SCALED)
    tl.store(v_pages_ptr + place + head * D + col, saturate(v, LIMIT).to(v_pages_ptr.dtype.element_ty), mask=mask)


@launcher(mutates=("k_pages", "v_pages"))
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
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    (T, H, D), K, R = q.shape, k.shape[1], cos.shape[-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norm = q_weight is not None
    width = next_power_of_2(D)
    launch(
        qk_norm_rope_kv_write_kernel, (T,),
        q, k, v, q_weight if norm else q, k_weight if norm else k, cos, sin, positions, slots, out, k_pages, v_pages,
        k if k_scale is None else k_scale, v if v_scale is None else v_scale,
        H, K, *q.stride(), *k.stride(), *v.stride(), cos.stride(0),
        eps=eps, D=D, R=R, NORM=norm, INTERLEAVED=interleaved, LIMIT=page_limit(k_pages),
        K_SCALED=k_scale is not None, V_SCALED=v_scale is not None,
        Q_HEADS=next_power_of_2(H), K_HEADS=next_power_of_2(K),
        HALF=next_power_of_2(R), REST=next_power_of_2(D - 2 * R) if D > 2 * R else 0, WHOLE=width,
        num_warps=max(1, min(8, next_power_of_2(H) * width // 1024)),
    )  # fmt: skip
    return out


def _qk_norm_rope_write_fused(
    q, k, v, q_weight, k_weight, cos, sin, positions, k_pages, v_pages, slots, eps=1e-6, interleaved=False,
    k_scale=None, v_scale=None,
):  # fmt: skip
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("qk_norm_rope_write: the pages must be contiguous")
    return qk_norm_rope_write_launch(
        q, k, v, q_weight, k_weight, cos, sin, positions, k_pages, v_pages, slots, eps, interleaved, k_scale, v_scale
    )


def _batch(m, T, H, K, D, R, P, page, norm=True):
    q, k, v = m.normal(T, H, D, grad=False), m.normal(T, K, D, grad=False), m.normal(T, K, D, grad=False)
    weights = (m.normal(D, grad=False), m.normal(D, grad=False)) if norm else (None, None)
    cos, sin = (m.normal(64, R, dtype=torch.float32, grad=False) for _ in range(2))
    pages = (torch.zeros(P, page, K, D, dtype=m.dtype, device=m.device) for _ in range(2))
    slots = torch.randperm(P * page, generator=m.generator)[:T].to(m.device)
    slots[T // 2 : T // 2 + 1] = -1
    return q, k, v, *weights, cos, sin, m.integers(0, 64, T), *pages, slots


qk_norm_rope_write = Op(
    name="qk_norm_rope_write",
    reference=_qk_norm_rope_write,
    fused=_qk_norm_rope_write_fused,
    mutates=("k_pages", "v_pages"),
    cases=[
        Case("grouped heads", lambda m: _batch(m, 5, 4, 2, 32, 16, 3, 4)),
        Case("without norm", lambda m: _batch(m, 5, 4, 2, 32, 16, 3, 4, norm=False)),
        Case("interleaved, part of the head", lambda m: _batch(m, 4, 3, 1, 24, 8, 3, 4), {"interleaved": True}),
        Case(
            "a scale a head",
            lambda m: (
                *_batch(m, 5, 4, 2, 24, 8, 3, 4),
                {"k_scale": m.tensor([0.5, 3.0]), "v_scale": m.tensor([2.0, 0.3])},
            ),
        ),
        Case("8192 tokens, 32 and 8 heads of 128", lambda m: _batch(m, 8192, 32, 8, 128, 64, 1024, 16), bench=True),
    ],
    traffic=lambda q, k, v, *_, **__: (2 * (q.nbytes + k.nbytes + v.nbytes), 0),
    budget=Budget(registers=96, vector=True),
)
