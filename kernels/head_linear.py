"""Batch-invariant linear layer with one matrix per head (MLA's absorbed projections).

Latent attention carries queries into the latent space and means of latents back by a matrix a head. As one product of
all heads (`torch.bmm`) that would be cuBLAS, whose order of sums follows the number of rows (see `linear.py`); here it
is `linear`'s rule: an output is one sum over the channels, from the first to the last, by the same instruction, and the
number of rows decides only how many of them share a tile. A weight may be a transposed view.

M rows, H heads, C input channels, F output features. Serving only: there is no gradient.
"""

import torch

from .core.lang import cdiv, generation, tl, triton, wide
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .core.tuned import tuned


def _head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, H, C) · weight (H, F, C)ᵀ per head: (M, H, F), accumulated in float32."""
    y_HMF = x.to(wide(x)).transpose(0, 1) @ weight.to(wide(x)).transpose(1, 2)
    return y_HMF.transpose(0, 1).to(x.dtype)


# ---- fused ----


@triton.jit(do_not_specialize=["M"])
def head_linear_kernel(
    x_ptr, weight_ptr, y_ptr, M, F, C, x_row, x_head, x_col, weight_head, weight_row, weight_col, y_row,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of one head. Features are the rows of the product, as in `linear_kernel`."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    head = tl.program_id(2).to(tl.int64)
    x_ptr += head * x_head
    weight_ptr += head * weight_head
    total = tl.zeros([BLOCK_F, ROWS], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c >= 0) if WHOLE else (c < C)
        w_mask, x_mask = (f < F)[:, None] & inside[None, :], (m < M)[None, :] & inside[:, None]
        w = tl.load(weight_ptr + f[:, None] * weight_row + c[None, :] * weight_col, mask=w_mask, other=0.0)
        x = tl.load(x_ptr + m[None, :] * x_row + c[:, None] * x_col, mask=x_mask, other=0.0)
        total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
    y = tl.trans(total).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + head * F + m[:, None] * y_row + f[None, :], y, mask=(m < M)[:, None] & (f < F)[None, :])


@launcher
def head_linear_forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    M, H, C = x.shape
    F = weight.shape[1]
    y = torch.empty(M, H, F, dtype=x.dtype, device=x.device)
    few = M <= 16 or x.dtype == torch.float32 or generation(x.device) == 0
    block = 16 if generation(x.device) == 0 else 64
    default = {"BLOCK_F": block, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3}
    tile = tuned("head_linear", x.device, f"{'few' if few else 'many'} {str(x.dtype)[6:]}", default)
    rows = 16 if few else 64
    launch(
        head_linear_kernel, (cdiv(M, rows), cdiv(F, tile["BLOCK_F"]), H),
        x, weight, y, M, F, C, *x.stride(), *weight.stride(), H * F,
        WHOLE=C % tile["BLOCK_C"] == 0, ROWS=rows, **tile,
    )  # fmt: skip
    return y


def _straight(m, M, H, C, F):
    return m.normal(M, H, C, grad=False), m.normal(H, F, C, scale=C**-0.5, grad=False)


def _transposed(m, M, H, C, F):
    return m.normal(M, H, C, grad=False), m.normal(H, C, F, scale=C**-0.5, grad=False).transpose(1, 2)


head_linear = Op(
    name="head_linear",
    reference=_head_linear,
    fused=head_linear_forward,
    shapes="x M H C, weight H F C",
    rows=("x",),
    cases=[
        Case("one row", lambda m: _straight(m, 1, 3, 24, 40)),
        Case("transposed", lambda m: _transposed(m, 20, 2, 40, 16)),
        Case("no rows", lambda m: _transposed(m, 0, 2, 16, 16)),
        Case("strided", lambda m: (m.strided(5, 2, 16, grad=False), m.strided(2, 24, 16, grad=False))),
        Case("32x128x128x512", lambda m: _transposed(m, 32, 128, 128, 512), bench=True),
        Case("32x128x512x128", lambda m: _straight(m, 32, 128, 512, 128), bench=True),
    ],
    traffic=lambda x, weight: (x.nbytes + weight.nbytes + x.nbytes // x.shape[-1] * weight.shape[1], 0),
    flops=lambda x, weight: (2 * x.numel() * weight.shape[1], 0),
    budget=Budget(),
)  # fmt: skip
