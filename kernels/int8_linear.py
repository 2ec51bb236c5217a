"""A linear layer whose weights are 8-bit integers with one scale a row.

When a model decodes one token at a time, each step reads every weight once and does almost nothing with it: the time is
the bytes. Integers of 8 bits halve them against bfloat16. Each output row is divided by its largest magnitude over 127
and rounded, and that scale multiplies the finished dot product, outside the sum. The kernel is that of `linear`, which
widens the integers on their way from memory to the product.

M rows, C input channels, F output features.
"""

import torch
import torch.nn.functional as F

from .core.launch import AutogradOp, as_rows, launcher
from .core.op import Budget, Case, Op
from .linear import product


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (F, C) as int8 and a float32 scale (F,); multiplied back, each entry is off by at most scale / 2."""
    scale_F = weight.float().abs().amax(-1) / 127
    safe_F1 = scale_F.where(scale_F > 0, 1.0).unsqueeze(-1)
    return (weight.float() / safe_F1).round().clamp(-127, 127).to(torch.int8), scale_F


def _int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (…, C) · weightᵀ · scale + bias for an int8 `weight` (F, C) and its `scale` (F,), accumulated in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.linear(x.to(wide), weight.to(wide)) * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _int8_linear_eager(x, weight, scale, bias=None):
    y = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


# ---- fused ----


@launcher
def int8_linear_forward(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return product("int8_linear", x, weight, scale, bias)


def _save(ctx, inputs, output):
    x, weight, scale, bias = inputs
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(weight, scale)


def _gradient(ctx, dy):
    weight, scale = ctx.saved_tensors
    dtype, bias_dtype = ctx.dtypes
    dx = ((dy * scale).to(dtype) @ weight.to(dtype)) if ctx.needs_input_grad[0] else None
    dbias = as_rows(dy).sum(0).to(bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias


_product = AutogradOp(int8_linear_forward, _save, _gradient)


def _int8_linear_fused(x, weight, scale, bias=None):
    return _product(x, weight, scale, bias)


def _batch(m, M, C, F_, bias=False):
    weight, scale = quantize_int8(m.normal(F_, C, dtype=torch.float32, grad=False))
    return m.normal(M, C), weight, scale, *([m.normal(F_)] if bias else [])


int8_linear = Op(
    name="int8_linear",
    reference=_int8_linear,
    eager=_int8_linear_eager,
    fused=_int8_linear_fused,
    rows=("x",),
    cases=[
        Case("one row", lambda m: _batch(m, 1, 64, 48)),
        Case("bias and tails", lambda m: _batch(m, 3, 72, 40, bias=True)),
        Case("more rows", lambda m: _batch(m, 20, 64, 32)),
        Case("1x4096x14336", lambda m: _batch(m, 1, 4096, 14336), bench=True),
        Case("64x4096x14336", lambda m: _batch(m, 64, 4096, 14336), bench=True),
        Case("4096x4096x4096", lambda m: _batch(m, 4096, 4096, 4096), bench=True),
    ],
    traffic=lambda x, weight, scale, bias=None: (
        weight.nbytes + x.nbytes + x.nbytes // x.shape[-1] * len(weight),
        weight.nbytes + x.nbytes + x.nbytes // x.shape[-1] * len(weight),
    ),
    budget=Budget(registers=255, vector=True, wgmma=True),
    flops=lambda x, weight, scale, bias=None: (2 * x.numel() * len(weight), 2 * x.numel() * len(weight)),
)
