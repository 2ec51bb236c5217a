"""Fused LM head and cross-entropy on a CPU, on our GEMM (gemm.py), 64 rows at a time.

A tile's logits stay in the cache of its thread: product, loss, gradient, product with the weight, and their packing as
an operand of the weight's gradient, which is a sum in float32 over slabs of rows (csrc/cpu/training/token_rows.cpp).
In bfloat16: in float32 a tile's logits of 8192 classes outgrow the cache, and a call for each product is as fast.

N rows, C channels, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm
from .pointwise import _native

SLAB = 1 << 23  # logits: their gradients, 16 MB in bfloat16, are read once more from the last cache


def fits(hidden_NC: Tensor, weight_VC: Tensor) -> bool:
    """Return whether the fused loss applies, and is faster."""
    return hidden_NC.dtype == torch.bfloat16 and gemm.takes(hidden_NC, weight_VC)


def rows_per_slab(V: int) -> int:
    """Rows of a slab: whole blocks, so that weight gradients sum in one order whatever the number of rows."""
    return max(1, SLAB // V // gemm.BLOCK) * gemm.BLOCK


def walk(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    options,
    scale_N: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses of all rows; given their upstream gradients, also the gradients of hidden and weight."""
    (N, C), V, dtype = hidden_NC.shape, len(weight_VC), hidden_NC.dtype
    hidden_NC, targets_N, weight_VC = hidden_NC.contiguous(), targets_N.contiguous(), weight_VC.contiguous()
    packed = gemm.Packed(weight_VC, want_hidden)
    losses_N = torch.empty(N)
    d_hidden_NC = torch.empty_like(hidden_NC) if want_hidden else None
    d_weight_VC = torch.zeros(V, C) if want_weight else None
    for start in range(0, N, rows_per_slab(V)):
        rows = slice(start, min(N, start + rows_per_slab(V)))
        count = rows.stop - start
        scale_S = None if scale_N is None else scale_N[rows].float().contiguous()
        left, right = (gemm.room(count, n, dtype) if want_weight else None for n in (V, C))
        _native.head_loss(
            options.ignore_index, options.label_smoothing, options.z_loss, hidden_NC[rows], packed.forth, packed.back,
            targets_N[rows], scale_S, losses_N[rows], None if d_hidden_NC is None else d_hidden_NC[rows], left, right,
        )  # fmt: skip
        if want_weight:
            _native.multiply_tokens(left, right, count, d_weight_VC, True, torch.get_num_threads())
    return losses_N, d_hidden_NC, None if d_weight_VC is None else d_weight_VC.to(dtype)
