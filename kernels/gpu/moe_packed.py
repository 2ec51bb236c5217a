"""Grouped GEMM with packed weights (8 or 4 bits), in one launch.

`moe_experts.py` with a tile of codes dequantized on its way to the product (`packed_linear.py`): the same sums in the
same order, so the bits of experts of dequantized weights. The codes of all experts lie one below the other, so a row of
an expert is a row of one tall matrix, and dequantizing needs not know of experts. A tile is features times rows, as in
`packed_linear`: then a few rows are the short side of the product.
"""

from collections.abc import Sequence

import torch

from ..core.lang import cdiv, generation, next_power_of_2, tl, triton
from ..core.launch import last_dim_contiguous, launch, launcher
from ..core.tuned import tuned
from ..packed_linear import PackedTensor, dequantize_arguments, dequantize_tile, hadamard_rotated
from .moe_experts import _tile_of_expert
from .moe_launch import _combine, _route

FEW, SOME = 16, 64
"""Rows of a tile: for at most as many assignments an expert, on average."""


@triton.jit
def moe_packed_gemm_kernel(
    a, codes, scales, minima, units, bias, order, offsets, out,
    E, N, K, G, columns, stride_a, codes_row, scales_row, scales_column,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr,
    TABLE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grouped GEMM out = a · W[expert]ᵀ + bias, dequantizing W. With TOP_K, rows are gathered from tokens and grouped
    by expert; without, grouped rows go in and come out by token and choice."""
    pid = tl.program_id(0)
    found = _tile_of_expert(pid // columns, offsets, E, BLOCK_M, BLOCK_E)
    expert, first, end = found[0], found[1], found[2]
    if first >= end:
        return
    place = first + tl.arange(0, BLOCK_M)
    assignment = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
    source, target = (assignment // TOP_K, place.to(tl.int64)) if TOP_K > 0 else (place.to(tl.int64), assignment)
    n = (pid % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, last = expert * N + n, expert * N + N
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (k >= 0) if WHOLE else (k < K)
        rows = tl.load(
            a + source[None, :] * stride_a + k[:, None], mask=(place < end)[None, :] & inside[:, None], other=0.0
        )
        w = dequantize_tile(
            codes, scales, minima, units, row, start, last, G, codes_row, scales_row, scales_column,
            BITS, GROUP, MINIMUM, TABLE, FIRST, SECOND, WHOLE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(w.to(rows.dtype), rows, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + row, mask=row < last, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(acc).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * N + n[None, :], y, mask=(place[:, None] < end) & (n[None, :] < N))


def _tile(a: torch.Tensor, assignments: int, experts: int) -> dict:
    """BLOCK_M of assignments, BLOCK_N of features, BLOCK_K of the sum: a multiple of every group."""
    arch = generation(a.device)
    if arch == 0:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    few = assignments <= FEW * experts or a.dtype == torch.float32
    default = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4 if arch >= 90 else 3}
    key = f"{'few' if few else 'some'} {str(a.dtype)[6:]}"
    return {"BLOCK_M": FEW if few else SOME, **tuned("moe_packed", a.device, key, default)}


@launcher
def moe_packed_gemm(
    a: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None, top_k: int,
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, units: torch.Tensor,
    bits: int, group: int, table: Sequence[int], rotate: bool,
) -> torch.Tensor:  # fmt: skip
    """Grouped GEMM over packed weights: tokens `a` with `top_k` experts each, or with 0 rows grouped by expert."""
    a = hadamard_rotated(a) if rotate else last_dim_contiguous(a)
    (A,), E, K = order.shape, len(offsets) - 1, a.shape[1]
    N, G = len(codes) // E, scales.shape[1]
    out = torch.empty(A, N, dtype=a.dtype, device=a.device)
    tile = _tile(a, A, E)
    columns = cdiv(N, tile["BLOCK_N"])
    weight = PackedTensor(codes, scales, minima, units, bits, group, table, rotate)
    packed, strides, form = dequantize_arguments(weight, K)
    launch(
        moe_packed_gemm_kernel, ((A // tile["BLOCK_M"] + E) * columns if A else 0,),
        a, *packed, a if bias is None else bias, order, offsets, out, E, N, K, G, columns, a.stride(0), *strides,
        TOP_K=top_k, BIAS=bias is not None, **form,
        WHOLE=K % tile["BLOCK_K"] == 0, BLOCK_E=max(16, next_power_of_2(E)), **tile,
    )  # fmt: skip
    return out


@launcher
def moe_packed_route(
    logits: torch.Tensor, top_k: int, softmax: bool, normalize: bool, first: int, experts: int
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """Route to the experts from `first` on: weights, numbers, order, offsets, and the routing statistics."""
    weights_TK, experts_TK, order_A, offsets_E, counts_E, balance, z = _route(logits, top_k, softmax, normalize)
    some = offsets_E if experts == logits.shape[1] else offsets_E[first : first + experts + 1].clone()
    return weights_TK, experts_TK, order_A, some, counts_E, balance, z


@launcher
def moe_packed_combine(
    parts: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    x: torch.Tensor,
    first: int,
    here: int,
    whole: int,
) -> torch.Tensor:
    """Weighted sum of the outputs of each token's experts that are in this process."""
    return _combine(parts, weights, experts, x, None if here == whole else (first, first + here))
