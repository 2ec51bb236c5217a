"""`linear_residual` and `normed_linear` with packed weights: RMSNorm and residual fused into the products, by
codes as `packed_linear` dequantizes them.

The division by the root mean square commutes with a rotation of the columns as it does with the product.

Serving only: there is no gradient. M rows, C input channels, F output features, P = F / 64 parts.
"""

from collections.abc import Sequence

import torch

from .core.lang import cdiv, wide
from .core.launch import launcher
from .core.op import Budget, Case, Op
from .linear import GROUP
from .linear_residual import linear_residual, normed_linear
from .packed_linear import E2M1, TURNED, PackedTensor, dequantize, packed_batch, packed_product
from .swiglu import check_activation


def _packed_linear_residual(
    x: torch.Tensor,
    weight: PackedTensor,
    stream: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_residual` with the weight of `packed_linear`."""
    return linear_residual.reference(x, dequantize(weight, x.shape[-1], wide(x)), stream, norm_weight, bias)


def _packed_normed_linear(
    x: torch.Tensor,
    square_sums: torch.Tensor,
    weight: PackedTensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "",
) -> torch.Tensor:
    """`normed_linear` with the weight of `packed_linear`."""
    return normed_linear.reference(x, square_sums, dequantize(weight, x.shape[-1], wide(x)), bias, eps, activation)


# ---- fused ----


@launcher(mutates=("stream",))
def packed_linear_residual_launch(
    x: torch.Tensor, stream: torch.Tensor, norm_weight: torch.Tensor, bias: torch.Tensor | None,
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, units: torch.Tensor,
    bits: int, group: int, table: Sequence[int], rotate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = stream.view(-1, stream.shape[-1])
    sums_MP = torch.empty(cdiv(rows.shape[1], GROUP), len(rows), dtype=torch.float32, device=x.device).T
    weight = PackedTensor(codes, scales, minima, units, bits, group, table, rotate)
    return packed_product(x, weight, bias, join=(rows, norm_weight, sums_MP)), sums_MP


def _residual_fused(x, weight, stream, norm_weight, bias=None):
    if not stream.is_contiguous():
        raise ValueError("packed_linear_residual: the stream must be contiguous")
    return packed_linear_residual_launch(x, stream, norm_weight, bias, *weight)


@launcher
def packed_normed_linear_launch(
    x: torch.Tensor, square_sums: torch.Tensor, bias: torch.Tensor | None, eps: float, activation: str,
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, units: torch.Tensor,
    bits: int, group: int, table: Sequence[int], rotate: bool,
) -> torch.Tensor:  # fmt: skip
    weight = PackedTensor(codes, scales, minima, units, bits, group, table, rotate)
    return packed_product(x, weight, bias, activation, squares=(square_sums, eps))


def _normed_fused(x, square_sums, weight, bias=None, eps=1e-6, activation=""):
    if activation:
        check_activation(activation)
    C = x.shape[-1]
    if weight.rotate and C % TURNED:
        raise ValueError(f"packed_normed_linear: {C} rotated columns; they must be a multiple of {TURNED}")
    return packed_normed_linear_launch(x, square_sums, bias, eps, activation, *weight)


def _joined(m, M, C, F, bits=8, **how):
    x, weight, *bias = packed_batch(m, M, C, F, bits, **how)
    stream, norm = m.normal(M, F, grad=False), m.normal(F, grad=False)
    return x.detach(), weight, stream, norm, *(b.detach() for b in bias)


def _summed(m, M, C, F, bits=8, **how):
    x, weight, *bias = packed_batch(m, M, C, F, bits, **how)
    squares = torch.nn.functional.pad(x.detach().float().square(), (0, -C % GROUP)).unflatten(-1, (-1, GROUP)).sum(-1)
    return x.detach(), squares, weight, *(b.detach() for b in bias)


BUDGET = {
    "packed_linear_kernel": Budget(vector=True, wgmma=True, copies=2, products=1),
    "dequantize_kernel": Budget(registers=64, vector=True),
    "linear_kernel": Budget(stack=16, vector=True, wgmma=True, copies=2, products=1),
}

packed_linear_residual = Op(
    name="packed_linear_residual",
    reference=_packed_linear_residual,
    fused=_residual_fused,
    shapes="x ... C, stream ... F, norm_weight F, bias F",
    mutates=("stream",),
    rows=("x", "stream"),
    cases=[
        Case("one row", lambda m: _joined(m, 1, 64, 128)),
        Case("bias and tails", lambda m: _joined(m, 3, 72, 100, bias=True)),
        Case("float8", lambda m: _joined(m, 3, 64, 64, float8=True)),
        Case("4 bits, rotated", lambda m: _joined(m, 20, 128, 64, 4, minimum=True, rotate=True)),
        Case("1x4096x4096", lambda m: _joined(m, 1, 4096, 4096), bench=True),
        Case("64x4096x4096, 4 bits", lambda m: _joined(m, 64, 4096, 4096, 4, minimum=True), bench=True),
        Case("4096x4096x4096, 4 bits", lambda m: _joined(m, 4096, 4096, 4096, 4, minimum=True), bench=True),
    ],
    traffic=lambda x, weight, stream, *_, **__: (weight.nbytes + x.nbytes + 3 * stream.nbytes, 0),
    flops=lambda x, weight, *_, **__: (2 * x.numel() * len(weight.units), 0),
    budget=BUDGET,
)

packed_normed_linear = Op(
    name="packed_normed_linear",
    reference=_packed_normed_linear,
    fused=_normed_fused,
    shapes="x ... C, bias F",
    rows=("x", "square_sums"),
    cases=[
        Case("one row", lambda m: _summed(m, 1, 128, 48)),
        Case("bias and tails", lambda m: _summed(m, 3, 72, 40, bias=True)),
        Case("4 bits, rotated, gated", lambda m: _summed(m, 20, 64, 128, 4, rotate=True), {"activation": "silu"}),
        Case("float8", lambda m: _summed(m, 3, 64, 32, float8=True)),
        Case("table", lambda m: _summed(m, 3, 64, 32, 4, group=32, table=E2M1)),
        Case("1x4096x6144", lambda m: _summed(m, 1, 4096, 6144), bench=True),
        Case(
            "64x4096x28672, 4 bits, gated",
            lambda m: _summed(m, 64, 4096, 28672, 4, minimum=True),
            {"activation": "silu"},
            bench=True,
        ),
        Case(
            "4096x4096x28672, 4 bits, gated",
            lambda m: _summed(m, 4096, 4096, 28672, 4, minimum=True),
            {"activation": "silu"},
            bench=True,
        ),
    ],
    traffic=lambda x, sums, weight, *_, **__: (weight.nbytes + x.nbytes + sums.nbytes, 0),
    flops=lambda x, sums, weight, *_, **__: (2 * x.numel() * len(weight.units), 0),
    budget=BUDGET,
)
