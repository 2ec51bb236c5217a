"""Gated linear layer in one launch: f(x · Wgᵀ) · (x · Wuᵀ).

Decoding one token is hundreds of small launches. The gate needs none of its own: a thread that holds a gate's sum and
its up's can multiply them. So a tile of `linear` takes eight rows of Wg and the same eight of Wu in turn, and stores
half as many numbers. They are rounded once where the separate ops round twice.

M rows, C input channels, F features: `weight` (2 F, C) is all of Wg, then all of Wu.
"""

import torch

from .core.lang import wide
from .core.launch import AutogradOp, as_rows, launcher
from .core.op import Budget, Case, Op
from .linear import linear, product
from .swiglu import check_activation, swiglu_packed, swiglu_packed_backward


def _linear_swiglu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "silu"
) -> torch.Tensor:
    """`swiglu_packed(linear(x, weight, bias), activation)` for x (…, C) and a `weight` (2 F, C)."""
    gate_up = linear.reference(x.to(wide(x)), weight, bias)
    return swiglu_packed.reference(gate_up, activation).to(x.dtype)


# ---- fused ----


@launcher
def linear_swiglu_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    return product("linear_swiglu", x, weight, bias, activation)


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    want_x, want_weight, want_bias, _ = ctx.needs_input_grad
    gate_up = x @ weight.T if bias is None else x @ weight.T + bias
    d_gate_up = swiglu_packed_backward(gate_up, dy, ctx.activation)
    rows = as_rows(d_gate_up)
    dx = d_gate_up @ weight if want_x else None
    dweight = rows.T @ as_rows(x) if want_weight else None
    return dx, dweight, None if bias is None or not want_bias else rows.sum(0).to(bias.dtype), None


_product = AutogradOp(linear_swiglu_forward, _save, _gradient)


def _linear_swiglu_fused(x, weight, bias=None, activation="silu"):
    check_activation(activation)
    if x.shape[-1] % 16:  # rows that cannot be read 16 bytes at a time would take more registers than there are
        return _separate(x, weight, bias, activation)
    return _product(x, weight, bias, activation)


def _separate(x, weight, bias=None, activation="silu"):
    return swiglu_packed(linear(x, weight, bias), activation)


def _batch(m, M, C, F, bias=False):
    return m.normal(M, C), m.normal(2 * F, C, scale=C**-0.5), *([m.normal(2 * F)] if bias else [])


def _moved(x, weight, bias=None, activation="silu"):
    return x.nbytes + weight.nbytes + x.nbytes // x.shape[-1] * len(weight) // 2


linear_swiglu = Op(
    name="linear_swiglu",
    reference=_linear_swiglu,
    eager=_separate,
    fused=_linear_swiglu_fused,
    native=True,
    shapes="x ... C, weight F C, bias F",
    rows=("x",),
    autocast=True,
    cases=[
        Case("one row", lambda m: _batch(m, 1, 64, 48)),
        Case("bias and tails", lambda m: _batch(m, 3, 80, 37, bias=True)),
        Case("channels no multiple of 16", lambda m: _batch(m, 3, 72, 24, bias=True)),
        Case("more than a tile", lambda m: _batch(m, 20, 64, 32), {"activation": "gelu"}),
        Case("no rows", lambda m: _batch(m, 0, 32, 16)),
        Case("strided", lambda m: (m.strided(5, 48), m.strided(24, 48)), {"activation": "relu2"}),
        Case("expanded gradient", lambda m: _batch(m, 6, 32, 16), expanded=True),
        Case("1x1024x3072", lambda m: _batch(m, 1, 1024, 3072), bench=True),
        Case("64x4096x14336", lambda m: _batch(m, 64, 4096, 14336), bench=True),
        Case("8192x4096x14336", lambda m: _batch(m, 8192, 4096, 14336), bench=True),
    ],
    traffic=lambda *args, **__: (_moved(*args), 3 * _moved(*args)),
    flops=lambda x, weight, *_, **__: (2 * x.numel() * len(weight), 6 * x.numel() * len(weight)),
    budget={
        "linear_kernel": Budget(stack=16, vector=True, wgmma=True, copies=2, products=1),
        "swiglu_bwd_kernel": Budget(registers=64, vector=True),
    },
)
