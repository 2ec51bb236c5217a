"""Linear layers fused with residual add and RMSNorm: sums of squares in one epilogue, the division in the next.

In a pre-norm block each sublayer ends with a product whose result joins the stream, and the next begins with a norm of
the stream and a product: y = W (x / rms(x) · g). Decoding one token is hundreds of small launches, and the norm between
is one that reads a row which the product before it has just held, in tiles. But the division by the root mean square
commutes with the product behind: y = W (x · g) / rms(x). So the product before stores x · g and the sums of the squares
of 64 features each, and the product behind adds these up and divides what it has summed.

The sums are the same for a row in any batch: within a part neighbors are added first, and parts in order, whatever the
tile. Roundings are as many as with a norm between. x · g is not normalized, though: in float16 it might overflow.

Serving only: there is no gradient. M rows, C input channels, F output features, P = F / 64 parts.
"""

import torch

from .core.lang import cdiv, wide
from .core.launch import as_rows, launcher
from .core.op import Budget, Case, Op
from .linear import GROUP, linear, product
from .swiglu import check_activation, swiglu_packed


def _linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    stream: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    arrivals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`stream` += x (…, C) · weightᵀ (F, C) + bias, in place; returns stream · `norm_weight` (…, F) and sums of squares
    (M, P) of the stream's rows, the inputs of `normed_linear`.

    `arrivals`, the weight's `arrival_counters`, spare the fused twin a launch."""
    stream.add_(linear.reference(x.to(wide(x)), weight, bias))
    x_wide = stream.to(wide(stream))
    squares = torch.nn.functional.pad(as_rows(x_wide).square(), (0, -stream.shape[-1] % GROUP))
    return (x_wide * norm_weight.to(x_wide.dtype)).to(stream.dtype), squares.unflatten(-1, (-1, GROUP)).sum(-1)


def _normed_linear(
    x: torch.Tensor,
    square_sums: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "",
    *,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer of rows x (…, C) divided by sqrt(sum(square_sums (M, P)) / C + eps); with an `activation` through
    the gate of `swiglu_packed`. `arrivals` as in `linear_residual`."""
    inverse_rms = torch.rsqrt(square_sums.to(wide(x)).sum(-1) / x.shape[-1] + eps).view(*x.shape[:-1], 1)
    y = linear.reference(x.to(wide(x)) * inverse_rms, weight, bias)
    return (swiglu_packed.reference(y, activation) if activation else y).to(x.dtype)


# ---- fused ----


@launcher(mutates=("stream", "arrivals"))
def linear_residual_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    stream: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None,
    arrivals: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = stream.view(-1, stream.shape[-1])
    parts = cdiv(rows.shape[1], GROUP)
    sums_MP = torch.empty(parts, len(rows), dtype=torch.float32, device=x.device).T  # a part of neighbors is one read
    y = product("linear_residual", x, weight, bias, join=(rows, norm_weight, sums_MP), arrivals=arrivals)
    return y, sums_MP


def _linear_residual_fused(x, weight, stream, norm_weight, bias=None, *, arrivals=None):
    if not stream.is_contiguous():
        raise ValueError("linear_residual: the stream must be contiguous")
    return linear_residual_launch(x, weight, stream, norm_weight, bias, arrivals)


@launcher(mutates=("arrivals",))
def normed_linear_launch(
    x: torch.Tensor,
    square_sums: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    arrivals: torch.Tensor | None,
) -> torch.Tensor:
    return product("normed_linear", x, weight, bias, activation, squares=(square_sums, eps), arrivals=arrivals)


def _normed_linear_fused(x, square_sums, weight, bias=None, eps=1e-6, activation="", *, arrivals=None):
    if activation:
        check_activation(activation)
        if x.shape[-1] % 16:  # as `linear_swiglu`: two launches rather than more registers than there are
            return swiglu_packed(normed_linear_launch(x, square_sums, weight, bias, eps, "", arrivals), activation)
    return normed_linear_launch(x, square_sums, weight, bias, eps, activation, arrivals)


def _joined(m, M, C, F, bias=False):
    stream = m.normal(M, F, grad=False)
    weight = m.normal(F, C, scale=C**-0.5, grad=False)
    return (
        m.normal(M, C, grad=False),
        weight,
        stream,
        m.normal(F, grad=False),
        m.normal(F, grad=False) if bias else None,
    )


def _summed(m, M, C, F, bias=False):
    x = m.normal(M, C, grad=False)
    squares = torch.nn.functional.pad(x.float().square(), (0, -C % GROUP)).unflatten(-1, (-1, GROUP)).sum(-1)
    return x, squares, m.normal(F, C, scale=C**-0.5, grad=False), m.normal(F, grad=False) if bias else None


linear_residual = Op(
    name="linear_residual",
    reference=_linear_residual,
    fused=_linear_residual_fused,
    shapes="x ... C, weight F C, stream ... F, norm_weight F, bias F",
    mutates=("stream",),
    rows=("x", "stream"),
    cases=[
        Case("one row", lambda m: _joined(m, 1, 32, 128)),
        Case("bias and tails", lambda m: _joined(m, 3, 72, 100, bias=True)),
        Case("more than a tile", lambda m: _joined(m, 20, 32, 64)),
        Case("channels split", lambda m: _joined(m, 3, 600, 100, bias=True)),
        Case("no rows", lambda m: _joined(m, 0, 32, 64)),
        Case("1x2048x1024", lambda m: _joined(m, 1, 2048, 1024), bench=True),
        Case("64x4096x4096", lambda m: _joined(m, 64, 4096, 4096), bench=True),
        Case("64x3072x1024", lambda m: _joined(m, 64, 3072, 1024), bench=True),
        Case("8192x2048x1024", lambda m: _joined(m, 8192, 2048, 1024), bench=True),
        Case("8192x4096x4096", lambda m: _joined(m, 8192, 4096, 4096), bench=True),
    ],
    traffic=lambda x, weight, stream, *_: (x.nbytes + weight.nbytes + 3 * stream.nbytes, 0),
    flops=lambda x, weight, *_: (2 * x.numel() * len(weight), 0),
    budget=Budget(stack=24, vector=True, wgmma=True, copies=2, products=1),
)

normed_linear = Op(
    name="normed_linear",
    reference=_normed_linear,
    fused=_normed_linear_fused,
    shapes="x ... C, weight F C, bias F",
    rows=("x", "square_sums"),
    cases=[
        Case("one row", lambda m: _summed(m, 1, 128, 48)),
        Case("bias and tails", lambda m: _summed(m, 3, 72, 40, bias=True)),
        Case("channels split, gated", lambda m: _summed(m, 2, 592, 64), {"activation": "silu"}),
        Case("gated", lambda m: _summed(m, 20, 64, 64), {"activation": "silu"}),
        Case("gated, channels no multiple of 16", lambda m: _summed(m, 3, 72, 24, bias=True), {"activation": "gelu"}),
        Case("no rows", lambda m: _summed(m, 0, 32, 32)),
        Case("1x1024x4096", lambda m: _summed(m, 1, 1024, 4096), bench=True),
        Case("64x4096x28672, gated", lambda m: _summed(m, 64, 4096, 28672), {"activation": "silu"}, bench=True),
        Case("8192x4096x6144", lambda m: _summed(m, 8192, 4096, 6144), bench=True),
    ],
    traffic=lambda x, sums, weight, *_, **__: (x.nbytes + sums.nbytes + weight.nbytes, 0),
    flops=lambda x, sums, weight, *_, **__: (2 * x.numel() * len(weight), 0),
    budget={
        "linear_kernel": Budget(stack=16, vector=True, wgmma=True, copies=2, products=1),
        "swiglu_fwd_kernel": Budget(registers=64, vector=True),
    },
)
