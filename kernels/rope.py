"""Rotary position embedding (RoPE) of queries and keys, by tables of cosines and sines.

Each query and key is read as D/2 points in a plane; the point i of a token at position p turns by p · θ_i, with
frequencies θ_i falling geometrically from 1 to 1/theta. A query at p and a key at s then meet at the angle (p − s) ·
θ_i, whatever p and s are. The backward is the same rotation the other way.

Two pairings exist: half-split (i with i + D/2, as Llama's released weights) and interleaved (2i with 2i + 1, as the
paper). Tables hold D/2 columns and may be narrower than the head (2 · columns < D): the rest of the head passes
through. Longer contexts than were trained come from turning more slowly: `rope_tables` knows linear, NTK, YaRN and
Llama-3 and LongRoPE scaling, with the same formulas, rounded in the same places, as `transformers`.

B batch, T time, H query heads, K key heads, D head dim, R = half the rotary dim.
"""

import math
from collections.abc import Mapping

import torch

from .core.lang import next_power_of_2, tl, triton, wide
from .core.launch import AutogradOp, launch, launcher
from .core.op import Budget, Case, Op
from .cpu import pointwise


def rope_tables(
    head_dim: int, max_len: int, theta: float = 10_000.0, scaling: Mapping | None = None, device=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables (max_len, head_dim / 2) of cos(p · θ_i) and sin(p · θ_i) in float32.

    `scaling` is the mapping found in a model's config.json: `rope_type` ("linear", "ntk", "dynamic", "yarn", "llama3",
    "longrope" or "default"), `factor`, and what else the type needs. YaRN's and LongRoPE's attention factor is
    multiplied into both tables.
    """
    if head_dim % 2:
        raise ValueError(f"rope_tables: head_dim is {head_dim}; it must be even: a rotation turns pairs")
    frequencies, attention_factor = _frequencies(head_dim, max_len, float(theta), scaling or {}, device)
    angles = torch.arange(max_len, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _frequencies(dim: int, max_len: int, theta: float, scaling: Mapping, device) -> tuple[torch.Tensor, float]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if kind == "default":
        return 1.0 / theta**exponents, 1.0
    if kind == "longrope":
        return _longrope(theta**exponents, max_len, scaling)
    if kind not in ("linear", "ntk", "dynamic", "yarn", "llama3"):
        raise ValueError(f"rope_type is {kind!r}; valid are default, linear, ntk, dynamic, yarn, llama3, longrope")
    factor = float(_required(scaling, kind, "factor"))
    if kind == "linear":
        return (1.0 / theta**exponents) / factor, 1.0
    if kind == "ntk":
        return 1.0 / (theta * factor ** (dim / (dim - 2))) ** exponents, 1.0
    original = _required(scaling, kind, "original_max_position_embeddings")
    if kind == "dynamic":
        stretch = factor * max(max_len, original) / original - (factor - 1)
        return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    if kind == "llama3":
        return _llama3(1.0 / theta**exponents, factor, original, scaling), 1.0
    return _yarn(theta**exponents, dim, theta, factor, original, scaling)


def _llama3(frequencies, factor, original, scaling):
    """Llama 3's scaling: low frequencies are divided by `factor`, high ones kept, with a ramp between."""
    low, high = _required(scaling, "llama3", "low_freq_factor"), _required(scaling, "llama3", "high_freq_factor")
    wavelength = 2 * math.pi / frequencies
    slow = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    ramp = (original / wavelength - low) / (high - low)
    blended = (1 - ramp) * slow / factor + ramp * slow
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, blended, slow)


def _yarn(periods, dim, theta, factor, original, scaling):
    """YaRN: frequencies that turn often within the trained context are kept, slow ones interpolated."""

    def column(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = column(scaling.get("beta_fast") or 32), column(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=periods.device) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    frequencies = 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1)
    return frequencies, float(attention_factor)


def _longrope(periods, max_len, scaling):
    """LongRoPE (Phi-3): a learned factor per frequency, one set up to the trained context, another beyond.

    transformers changes sets when a sequence passes the trained length; a cache of rotated keys cannot, so here the
    longest sequence that the model accepts decides.
    """
    original = _required(scaling, "longrope", "original_max_position_embeddings")
    which = "long_factor" if max_len > original else "short_factor"
    slow = torch.tensor(_required(scaling, "longrope", which), dtype=torch.float32, device=periods.device)
    if slow.shape != periods.shape:
        raise ValueError(f"rope scaling 'longrope': {which} has {len(slow)} numbers, and {len(periods)} waves rotate")
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        factor = scaling.get("factor") or max_len / original
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (slow * periods), float(attention_factor)


def _required(scaling: Mapping, kind: str, key: str):
    if scaling.get(key) is None:
        raise ValueError(f"rope scaling {kind!r} needs the field {key!r}; it has {', '.join(scaling)}")
    return scaling[key]


def _rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries (…, T, H, D) and keys (…, T, K, D) by the table rows of `positions` (…, T), or of 0 … T−1."""
    cos_TR, sin_TR = (cos[: q.shape[-3]], sin[: q.shape[-3]]) if positions is None else (cos[positions], sin[positions])
    return _rotate(q, cos_TR, sin_TR, interleaved), _rotate(k, cos_TR, sin_TR, interleaved)


def _rotate(x, cos_TR, sin_TR, interleaved):
    rotary = 2 * cos_TR.shape[-1]
    c, s = cos_TR.unsqueeze(-2).to(wide(x)), sin_TR.unsqueeze(-2).to(wide(x))
    turning = x[..., :rotary].to(c.dtype)
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned.to(x.dtype), x[..., rotary:]), -1) if rotary < x.shape[-1] else turned.to(x.dtype)


def _rope_eager(q, k, cos, sin, positions=None, interleaved=False):
    plain = cos.dtype == sin.dtype == torch.float32 and cos.stride() == sin.stride() and cos.stride(1) == 1
    if plain and not interleaved and k.shape[:-2] == q.shape[:-2] and pointwise.is_supported(q, k):
        return pointwise.rope(q, k, cos, sin, positions)
    return _rope(q, k, cos, sin, positions, interleaved)


# ---- fused ----


@triton.jit
def rotate(a, b, cos, sin):
    """Rotate the pairs (a, b) by an angle."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotate_heads(
    x_ptr, y_ptr, heads, x_head, x_dim, y_head, cos, sin,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one token: R pairs are rotated, the other D − 2R columns copied."""
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF).to(tl.int64)[None, :]
        mask = (head < heads) & (col < 2 * R)
        x = tl.load(x_ptr + head * x_head + col * x_dim, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(x.reshape([HEADS, HALF, 2]))
        a, b = rotate(a, b, cos, sin)
        y = tl.join(a, b).reshape([HEADS, 2 * HALF])
        tl.store(y_ptr + head * y_head + col, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        col = tl.arange(0, HALF).to(tl.int64)[None, :]
        mask = (head < heads) & (col < R)
        a = tl.load(x_ptr + head * x_head + col * x_dim, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + head * x_head + (col + R) * x_dim, mask=mask, other=0.0).to(tl.float32)
        a, b = rotate(a, b, cos, sin)
        tl.store(y_ptr + head * y_head + col, a.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + head * y_head + col + R, b.to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        col = 2 * R + tl.arange(0, REST).to(tl.int64)[None, :]
        mask = (head < heads) & (col < D)
        tl.store(y_ptr + head * y_head + col, tl.load(x_ptr + head * x_head + col * x_dim, mask=mask), mask=mask)


@triton.jit
def angles_of(cos_ptr, sin_ptr, position, table_row, R: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines of a position, each (1, HALF)."""
    col = tl.arange(0, HALF)[None, :]
    place = position.to(tl.int64) * table_row + col
    cos = tl.load(cos_ptr + place, mask=col < R, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=col < R, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr,
    T, q_heads, k_heads,
    q_batch, q_time, q_head, q_dim, k_batch, k_time, k_head, k_dim, table_row,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, POSITIONS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One token; its angles are read once for all heads of q and k."""
    token = tl.program_id(0).to(tl.int64)
    batch, time = token // T, token % T
    position = tl.load(positions_ptr + token) if POSITIONS else time
    cos, sin = angles_of(cos_ptr, sin_ptr, position, table_row, R, HALF)
    sin = -sin if BACKWARD else sin
    rotate_heads(
        q_ptr + batch * q_batch + time * q_time, q_out_ptr + token * q_heads * D, q_heads, q_head, q_dim, D, cos, sin,
        D, R, INTERLEAVED, Q_HEADS, HALF, REST,
    )  # fmt: skip
    rotate_heads(
        k_ptr + batch * k_batch + time * k_time, k_out_ptr + token * k_heads * D, k_heads, k_head, k_dim, D, cos, sin,
        D, R, INTERLEAVED, K_HEADS, HALF, REST,
    )  # fmt: skip


@launcher
def rope_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, H, D = q.shape[-3:]
    B, K, R = math.prod(q.shape[:-3]), k.shape[-2], cos.shape[-1]
    q_BTHD, k_BTKD, cos, sin = q.reshape(B, T, H, D), k.reshape(B, T, K, D), cos.contiguous(), sin.contiguous()
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if positions is not None:
        positions = positions.expand(q.shape[:-2]).reshape(-1)
    heads = next_power_of_2(max(H, K))
    launch(
        rope_kernel, (B * T,),
        q_BTHD, k_BTKD, cos, sin, q if positions is None else positions, q_out, k_out,
        T, H, K, *q_BTHD.stride(), *k_BTKD.stride(), cos.stride(0),
        D=D, R=R, INTERLEAVED=interleaved, BACKWARD=backward, POSITIONS=positions is not None,
        Q_HEADS=next_power_of_2(H), K_HEADS=next_power_of_2(K), HALF=next_power_of_2(R),
        REST=next_power_of_2(D - 2 * R) if D > 2 * R else 0,
        num_warps=max(1, min(8, heads * next_power_of_2(D) // 1024)),
    )  # fmt: skip
    return q_out, k_out


def _save(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, _ = inputs
    ctx.save_for_backward(cos, sin, positions)


def _unrotate(ctx, dq, dk):
    return *rope_rotate(dq, dk, *ctx.saved_tensors, ctx.interleaved, True), None, None, None, None, None


_rope_op = AutogradOp(rope_rotate, _save, _unrotate)


def _rope_fused(q, k, cos, sin, positions=None, interleaved=False):
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} may differ in their heads only")
    if positions is None and q.shape[-3] > len(cos):
        raise ValueError(f"rope: {q.shape[-3]} tokens and tables of {len(cos)} positions; make longer `rope_tables`")
    return _rope_op(q, k, cos, sin, positions, interleaved, False)


def _tables(m, length, half):
    return tuple(m.normal(length, half, dtype=torch.float32, grad=False) for _ in range(2))


rope = Op(
    name="rope",
    reference=_rope,
    eager=_rope_eager,
    native=True,
    fused=_rope_fused,
    shapes="q ... T H D, k ... T K D, cos rows R, sin rows R",
    rows=("q", "k", "positions"),
    cases=[
        Case("grouped heads", lambda m: (m.normal(2, 5, 4, 16), m.normal(2, 5, 2, 16), *_tables(m, 8, 8))),
        Case(
            "interleaved",
            lambda m: (m.normal(2, 5, 3, 16), m.normal(2, 5, 1, 16), *_tables(m, 8, 8)),
            {"interleaved": True},
        ),
        Case(
            "ragged positions",
            lambda m: (m.normal(7, 2, 24), m.normal(7, 2, 24), *_tables(m, 30, 12), m.integers(0, 30, 7)),
        ),
        Case("part of the head", lambda m: (m.normal(1, 4, 2, 24), m.normal(1, 4, 2, 24), *_tables(m, 4, 8))),
        Case("padded rows", lambda m: (m.padded(2, 3, 2, 16), m.padded(2, 3, 2, 16), *_tables(m, 3, 8))),
        Case(
            "expanded gradient",
            lambda m: (m.normal(2, 3, 2, 16), m.normal(2, 3, 2, 16), *_tables(m, 3, 8)),
            expanded=True,
        ),
        Case(
            "8x4096, 32 and 8 heads of 128",
            lambda m: (m.normal(8, 4096, 32, 128), m.normal(8, 4096, 8, 128), *_tables(m, 4096, 64)),
            bench=True,
        ),
    ],
    traffic=lambda q, k, *_, **__: (2 * (q.nbytes + k.nbytes), 2 * (q.nbytes + k.nbytes)),
    budget=Budget(registers=80, vector=True),
    flops=lambda q, k, *_, **__: (3 * (q.numel() + k.numel()), 3 * (q.numel() + k.numel())),
)
