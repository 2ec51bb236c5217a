"""Attention: softmax(q · kᵀ · scale) · v with causal masks, windows, grouped heads, soft caps and sinks.

The reference builds the T×S matrix of scores, which is what the formula says and what long contexts cannot afford. The
fused kernel goes over keys in blocks with a running maximum and a running sum, so the matrix is never materialized.

What a query may see: with `causal`, keys at its own position and before (a query shorter than the keys is aligned at
the end: the last query sees all keys); with `window`, only the last `window` of those, itself included. H query heads
share K key heads in groups of H / K. `softcap` bounds scores smoothly: c · tanh(score / c). A query that sees no key
gets zeros. `sinks` are a learned score a head that takes its share of the softmax and has no value (gpt-oss).

B batch, T queries, S keys, H query heads, K key heads, G = H / K, D head dim.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from .core.lang import wide
from .core.op import Budget, Case, Op
from .cpu.attention import cpu_attention
from .gpu.attention_launch import attention_fused, check


def visible(T: int, S: int, causal: bool, window: int | None, device=None) -> torch.Tensor:
    """The attention mask (T, S), True where a query sees a key."""
    distance_TS = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    seen = distance_TS >= 0 if causal else torch.ones_like(distance_TS, dtype=torch.bool)
    return seen & (distance_TS.abs() < window) if window is not None else seen


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Attention of q (B, T, H, D) over k and v (B, S, K, D), with sinks (H,); the result has q's shape.

    Ragged batches: pass (T, H, D) and (T, K, D) with the sequences end to end and `cu_seqlens` (N + 1,), the offsets
    between them; no token sees another sequence. `max_seqlen` bounds their length, so that a GPU need not be asked.
    """
    check(q, k, v, window, cu_seqlens, scale, sinks)
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    if cu_seqlens is not None:
        return _each_sequence(_attention, q, k, v, cu_seqlens, options)
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    dtype = wide(q)
    q_BKGTD = q.to(dtype).transpose(1, 2).reshape(B, K, H // K, T, D)
    k_BK1SD, v_BK1SD = (x.to(dtype).transpose(1, 2).unsqueeze(2) for x in (k, v))
    scores = q_BKGTD @ k_BK1SD.transpose(-2, -1) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen_TS = visible(T, S, causal, window, q.device)
    scores = scores.masked_fill(~seen_TS, -math.inf)
    if sinks is not None:  # one more key, which is dropped before the values
        sinks_BKGT1 = sinks.to(dtype).view(K, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks_BKGT1], -1)
    weights = torch.softmax(scores, -1)[..., :S].masked_fill(~seen_TS, 0.0)  # a row without keys is 0 / 0: make it 0
    return (weights @ v_BK1SD).reshape(B, H, T, D).transpose(1, 2).to(q.dtype)


def _attention_eager(
    q, k, v, *, causal=True, window=None, softcap=None, scale=None, sinks=None, cu_seqlens=None, max_seqlen=None
):
    """PyTorch's scaled_dot_product_attention where it computes the same: it has no soft cap and no sinks, and a row
    without keys is NaN there."""
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    check(q, k, v, window, cu_seqlens, scale, sinks)
    if cu_seqlens is not None:
        return _each_sequence(_attention_eager, q, k, v, cu_seqlens, options)
    T, S = q.shape[1], k.shape[1]
    if softcap is not None or sinks is not None or (causal and T > S) or (window is not None and T > S):
        return _attention(q, k, v, **options)
    bounded = window is not None and window < S
    plain = (not causal or T == 1) and not bounded
    square = causal and T == S and not bounded
    if square and (o := cpu_attention(q, k, v, scale)) is not None:
        return o
    mask = None if plain or square else visible(T, S, causal, window, q.device)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def _each_sequence(attend, q, k, v, cu_seqlens, options):
    shape = q.shape
    q, k, v = (x.reshape(1, -1, *x.shape[-2:]) for x in (q, k, v))
    edges = cu_seqlens.tolist()
    pieces = [attend(q[:, a:b], k[:, a:b], v[:, a:b], **options) for a, b in itertools.pairwise(edges) if b > a]
    rest = q.shape[1] - edges[-1]
    if rest or not pieces:
        pieces.append(torch.zeros_like(q[:, edges[-1] :]))
    return torch.cat(pieces, 1).reshape(shape)


def _qkv(m, B, T, S, H, K, D, scale=1.0):
    return m.normal(B, T, H, D, scale=scale), m.normal(B, S, K, D, scale=scale), m.normal(B, S, K, D)


def _packed(m, B, T, H, K, D):
    """Test case: q, k and v as views into one QKV projection, as in a model."""
    return m.normal(B, T, H + 2 * K, D, grad=False).split((H, K, K), 2)


def _ragged(m, lengths, H, K, D):
    T = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(m.device, torch.int32)
    return m.normal(T, H, D), m.normal(T, K, D), m.normal(T, K, D), {"cu_seqlens": offsets, "max_seqlen": max(lengths)}


def _pairs(q, k, causal=True, window=None, cu_seqlens=None, **_):
    """Count the visible (query, key) pairs over batch and heads, for FLOPs; sequences of a ragged batch count as
    equally long."""
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    T, S = (x.shape[-3] if cu_seqlens is None else x.shape[-3] // sequences for x in (q, k))
    seen = T * S - (T * (T - 1) // 2 if causal else 0)
    if window is not None and window < S:
        seen = min(seen, T * window * (1 if causal else 2))
    return seen * q.shape[-2] * sequences


attention = Op(
    name="attention",
    reference=_attention,
    eager=_attention_eager,
    native=True,
    fused=attention_fused,
    rows=("q", "k", "v"),
    autocast=True,
    cases=[
        Case("causal", lambda m: _qkv(m, 2, 33, 33, 2, 2, 32)),
        Case("full", lambda m: _qkv(m, 1, 20, 35, 2, 2, 32), {"causal": False}),
        Case("grouped heads", lambda m: _qkv(m, 1, 37, 37, 4, 2, 64)),
        Case("head of 80", lambda m: _qkv(m, 1, 18, 18, 1, 1, 80)),
        Case("one and one", lambda m: _qkv(m, 1, 1, 1, 2, 1, 32)),
        Case("queries at the end", lambda m: _qkv(m, 1, 7, 40, 2, 1, 32)),
        Case("more queries than keys", lambda m: _qkv(m, 1, 9, 4, 2, 1, 32)),
        Case("lengths of 113 and 203", lambda m: _qkv(m, 1, 113, 203, 1, 1, 16)),
        Case("head of 256", lambda m: _qkv(m, 1, 5, 9, 1, 1, 256)),
        Case("window", lambda m: _qkv(m, 1, 40, 40, 2, 1, 32), {"window": 5}),
        Case("window over many blocks", lambda m: _qkv(m, 1, 100, 130, 1, 1, 16), {"window": 40}),
        Case("window to both sides", lambda m: _qkv(m, 1, 90, 70, 1, 1, 16), {"window": 20, "causal": False}),
        Case("heads of a packed projection", lambda m: _packed(m, 1, 20, 4, 2, 32)),
        Case("every other column", lambda m: tuple(m.strided(1, 12, 2, 16) for _ in range(3))),
        Case("soft cap", lambda m: _qkv(m, 1, 20, 20, 2, 1, 32, 3.0), {"softcap": 5.0, "scale": 0.3}),
        Case("peaked", lambda m: _qkv(m, 1, 20, 20, 1, 1, 32, 8.0), steep=True),
        Case("ragged", lambda m: _ragged(m, (1, 20, 13), 2, 1, 32)),
        Case(
            "ragged, empty sequences and a tail",
            lambda m: (*_ragged(m, (40, 9, 3), 2, 2, 16)[:3], {"cu_seqlens": m.tensor([0, 0, 40, 40, 49])}),
            {"window": 8},
        ),
        Case("sinks", lambda m: (*_qkv(m, 2, 33, 40, 4, 2, 32), {"sinks": m.normal(4)})),
        Case(
            "sinks, ragged, a window and a tail",
            lambda m: (
                *_ragged(m, (40, 9, 3), 4, 2, 16)[:3],
                {"cu_seqlens": m.tensor([0, 0, 40, 49]), "sinks": m.normal(4)},
            ),
            {"window": 8},
        ),
        Case("more queries than keys, sinks", lambda m: (*_qkv(m, 1, 9, 4, 2, 1, 32), {"sinks": m.normal(2)})),
        Case("expanded gradient", lambda m: _qkv(m, 1, 17, 17, 2, 1, 32), expanded=True),
        Case("8192 causal, 32 and 8 heads of 128", lambda m: _qkv(m, 2, 8192, 8192, 32, 8, 128), bench=True),
        Case("16 times 1024, ragged, 32 and 8 heads of 128", lambda m: _ragged(m, [1024] * 16, 32, 8, 128), bench=True),
        Case(
            "8192 causal, 64 and 8 heads of 64, sinks",
            lambda m: (*_qkv(m, 1, 8192, 8192, 64, 8, 64), {"sinks": m.normal(64)}),
            bench=True,
        ),
        Case("8192 causal, 16 heads of 64", lambda m: _qkv(m, 4, 8192, 8192, 16, 16, 64), bench=True),
    ],
    traffic=lambda q, k, v, **_: (2 * q.nbytes + 2 * k.nbytes, 4 * q.nbytes + 4 * k.nbytes),
    budget={
        f"attention_{name}_kernel": Budget(wgmma=True, vector=True, tensor_share=share)
        for name, share in (("forward", 1.0), ("dq", 1.0), ("dkdv", 0.88))
    },
    flops=lambda q, k, v, **o: (4 * q.shape[-1] * _pairs(q, k, **o), 10 * q.shape[-1] * _pairs(q, k, **o)),
)
