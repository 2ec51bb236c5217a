"""Walsh-Hadamard transform of heads, which spreads outlier channels before quantization.

Keys are rotated by it before they are rounded to 8 bits with a common scale, and queries likewise, which leaves their
products alone (QuaRot's idea: on a real model keys lose a quarter of what they lose without; values would gain a tenth
of the little they lose). Only sums and differences, in one order everywhere: the same bits from PyTorch, from Triton
and from csrc/cpu/serving/hadamard.hpp.

A head is cut into powers of two up to 256, the largest first, and each is transformed, times a power of two near
1 / √size. `back` takes the smaller one where √size is none, so that a head there and back is itself, and a product of a
key there and a query back is theirs. Activations that meet rotated weights are heads of 64
(`packed_linear.hadamard_rotated`).

T tokens, H heads, D head dim.
"""

import torch

from .core.lang import cdiv, next_power_of_2, tl, triton, wide
from .core.launch import as_rows, last_dim_contiguous, launch, launcher
from .core.op import Budget, Case, Op

WIDEST = 256


def _hadamard(x: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Transform x (…, D), forward or `back`."""
    parts, rest = [], x.to(wide(x))
    while rest.shape[-1]:
        size = min(WIDEST, 1 << rest.shape[-1].bit_length() - 1)
        part, rest = rest[..., :size], rest[..., size:]
        for apart in [step for step in (16, 32, 64, 128, 8, 4, 2, 1) if step < size]:
            a, b = part.unflatten(-1, (-1, 2, apart)).unbind(-2)
            part = torch.stack([a + b, a - b], -2).flatten(-3)
        parts.append(part / 2 ** ((size.bit_length() - 1 + back) // 2))
    return torch.cat(parts, -1).to(x.dtype)


# ---- fused ----


@triton.jit
def _butterfly(x, level, D: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One butterfly level of the fast transform: sums and differences of columns `APART` apart."""
    if APART < COLUMNS:
        pairs = tl.reshape(x, [ROWS, COLUMNS // (2 * APART), 2, APART])
        sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, None, :, None]
        y = tl.where(sign > 0, tl.sum(pairs, 2, keep_dims=True), tl.sum(pairs * sign, 2, keep_dims=True))
        y = tl.reshape(y, [ROWS, COLUMNS])
        x = y if D == COLUMNS else tl.where(1 << level > APART, y, x)
    return x


@triton.jit
def transformed(x, D: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Transform rows x (ROWS, COLUMNS) in float32, of which the first D columns are a head."""
    column = tl.arange(0, COLUMNS)[None, :]
    highest = ((column ^ D).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # bit in which they differ
    level = tl.where(column < D, tl.minimum(highest, 8), 0)  # a block has 2 ** level columns
    x = _butterfly(x, level, D, 16, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 32, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 64, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 128, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 8, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 4, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 2, ROWS, COLUMNS)
    x = _butterfly(x, level, D, 1, ROWS, COLUMNS)
    return x / (1 << (level + BACK) // 2).to(tl.float32)


@triton.jit(do_not_specialize=["heads"])
def hadamard_heads_kernel(
    x_ptr, y_ptr, heads, x_row, D: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Transform a block of heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < heads) & (column < D)
    x = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    y = transformed(x, D, BACK, ROWS, COLUMNS)
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@launcher
def hadamard_launch(x: torch.Tensor, back: bool) -> torch.Tensor:
    D, y = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = last_dim_contiguous(as_rows(x)), next_power_of_2(D)
    size = max(1, 2048 // columns)
    launch(
        hadamard_heads_kernel, (cdiv(len(rows), size),), rows, y, len(rows), rows.stride(0),
        D=D, BACK=int(back), ROWS=size, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return y


def _hadamard_fused(x, back=False):
    return hadamard_launch(x, back)


hadamard = Op(
    name="hadamard",
    reference=_hadamard,
    fused=_hadamard_fused,
    shapes="x ... D",
    rows=("x",),
    cases=[
        Case("heads of 64", lambda m: (m.normal(5, 3, 64, grad=False),)),
        Case("back", lambda m: (m.normal(5, 3, 128, grad=False),), {"back": True}),
        Case("two sizes", lambda m: (m.normal(7, 80, grad=False),), {"back": True}),
        Case("more than the widest", lambda m: (m.normal(3, 2, 320, grad=False),)),
        Case("odd sizes", lambda m: (m.padded(4, 2, 27, grad=False),)),
        Case("8192 tokens, 32 heads of 128", lambda m: (m.normal(8192, 32, 128, grad=False),), bench=True),
    ],
    traffic=lambda x, *_, **__: (2 * x.nbytes, 0),
    budget=Budget(registers=96, vector=True),
)
