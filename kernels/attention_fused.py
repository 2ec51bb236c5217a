"""Launching the attention kernels: tile sizes, grids, and the two traceable ops with their gradient."""

import torch

from .attention_backward import _delta, _key_gradients, _query_gradients
from .attention_forward import _forward
from .lang import cdiv, next_power_of_2

L2_SHARE = 24 << 20
"""Bytes of keys and values that heads computed side by side may keep in the L2 cache."""


def tiles(kind, D, itemsize):
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


def _grid(tensor, block, length, heads, shared, batch, sequences, bytes_per_head):
    """-> (tiles per head, heads over the batch, heads per L2 group)."""
    count = cdiv(length, block) if sequences is None else length // block + sequences
    group = shared * max(1, L2_SHARE // max(bytes_per_head, 1))
    return count, batch * heads, min(group, batch * heads)


def attention_forward(q, k, v, cu, causal, window, softcap, scale):
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    o = torch.zeros_like(q, memory_format=torch.contiguous_format) if cu is not None else torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    conf = tiles("forward", D, q.itemsize)
    n = None if cu is None else cu.numel() - 1
    count, zs, group = _grid(q, conf["BLOCK_M"], T, H, H // K, B, n, 2 * S * D * k.itemsize)
    _forward[(count * zs,)](
        q, k, v, o, lse, cu, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *lse.stride()[:2],
        count, zs, H, group, T, S, n or 0, H // K, scale, softcap, causal, window, cu is not None, D, max(16, next_power_of_2(D)),
        PRECISION="ieee", **conf)
    return o, lse


def attention_backward(do, q, k, v, o, lse, cu, causal, window, softcap, scale, only=None):
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    n = None if cu is None else cu.numel() - 1
    BLOCK_D = max(16, next_power_of_2(D))
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    conf = tiles("query", D, q.itemsize)
    count, zs, group = _grid(q, conf["BLOCK_M"], T, H, H // K, B, n, 2 * S * D * k.itemsize)
    if only is None: _delta[(count * zs,)](
        o, do, delta, cu, *o.stride()[:3], *do.stride()[:3], *lse.stride()[:2],
        count, zs, H, group, T, S, n or 0, cu is not None, D, BLOCK_D, BLOCK_M=conf["BLOCK_M"])
    if only in (None,"q"): _query_gradients[(count * zs,)](
        q, k, v, do, lse, delta, dq, cu, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        *dq.stride()[:3], *lse.stride()[:2],
        count, zs, H, group, T, S, n or 0, H // K, scale, softcap, causal, window, cu is not None, D, BLOCK_D,
        PRECISION="ieee", **conf)
    conf = tiles("key", D, q.itemsize)
    count, zs, group = _grid(q, conf["BLOCK_N"], S, K, 1, B, n, 2 * T * D * k.itemsize)
    if only in (None,"k"): _key_gradients[(count * zs,)](
        q, k, v, do, lse, delta, dk, dv, cu, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], *lse.stride()[:2],
        count, zs, K, group, T, S, n or 0, H // K, scale, softcap, causal, window, cu is not None, D, BLOCK_D,
        PRECISION="ieee", **conf)
    return dq, dk, dv
