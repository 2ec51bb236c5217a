"""A linear layer whose weights are 8-bit integers with one scale a row.

When a model decodes one token at a time, each step reads every weight once and does almost nothing with it: the time is
the bytes. Integers of 8 bits halve them against bfloat16. Each output row is divided by its largest magnitude over 127
and rounded, and that scale multiplies the finished dot product, outside the sum.

M rows, C input channels, F output features.
"""

import torch
import torch.nn.functional as F

from .fused import Differentiable, as_rows, launch, launcher
from .lang import cdiv, next_power_of_2, tl, triton
from .op import Budget, Case, Op
from .tuned import tuned


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


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr,
    M, F, C, x_row, x_col, weight_row, weight_col,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of 16 rows, whatever M is: a row's result does not depend on how many there are."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        x_mask = (m < M)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_row + c[None, :] * x_col, mask=x_mask, other=0.0)
        w_mask = (f < F)[None, :] & (c < C)[:, None]
        weight = tl.load(weight_ptr + f[None, :] * weight_row + c[:, None] * weight_col, mask=w_mask, other=0)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision=PRECISION)
    y = total * tl.load(scale_ptr + f, mask=f < F, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + m[:, None] * F + f[None, :], y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (f < F)[None, :]
    )


@launcher
def int8_linear_forward(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    x_MC = as_rows(x)
    (M, C), F_ = x_MC.shape, len(weight)
    y = torch.empty(*x.shape[:-1], F_, dtype=x.dtype, device=x.device)
    default = {
        "BLOCK_F": 64 if F_ >= 8192 else 32,
        "BLOCK_C": 32 if x.dtype == torch.float32 else min(128, max(32, next_power_of_2(C))),
        "num_warps": 4,
        "num_stages": 4,
    }
    tile = tuned("int8_linear", x.device, f"{next_power_of_2(C)}x{next_power_of_2(F_)}", default)
    launch(
        _product_kernel, (cdiv(M, 16), cdiv(F_, tile["BLOCK_F"])),
        x_MC, weight, scale, x if bias is None else bias, y,
        M, F_, C, *x_MC.stride(), *weight.stride(),
        BIAS=bias is not None, ROWS=16, PRECISION="ieee", **tile,
    )  # fmt: skip
    return y


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


_product = Differentiable(int8_linear_forward, _save, _gradient)


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
        Case("16x4096x14336", lambda m: _batch(m, 16, 4096, 14336), bench=True),
    ],
    traffic=lambda x, weight, scale, bias=None: (
        weight.nbytes + x.nbytes + x.nbytes // x.shape[-1] * len(weight),
        weight.nbytes + x.nbytes + x.nbytes // x.shape[-1] * len(weight),
    ),
    budget=Budget(registers=168, vector=True),
    flops=lambda x, weight, scale, bias=None: (2 * x.numel() * len(weight), 2 * x.numel() * len(weight)),
)
