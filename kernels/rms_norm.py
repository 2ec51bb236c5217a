"""RMSNorm: divide a row by its root mean square, then scale each column by a learned weight.

y = x / sqrt(mean(x²) + eps) · weight. Unlike LayerNorm there is no mean to subtract and no bias to add, so a row needs
one reduction. Eager PyTorch walks the row about five times; fused, it is read once and written once. `add_rms_norm`
also takes the residual addition that always precedes the norm in a pre-norm block: two reads and two writes, not seven
passes.

The backward needs only x, the weight and one number a row, 1/rms. With x̂ = x / rms and g = dy · weight,
dx = (g − x̂ · mean(g · x̂)) / rms, and dweight is the sum over rows of dy · x̂.

N rows, D columns.
"""

from functools import partial

import torch

from .core.lang import cdiv, next_power_of_2, tl, triton, wide
from .core.launch import AutogradOp, as_rows, launch, launcher, sm_count
from .core.op import Budget, Case, Maker, Op
from .cpu import pointwise

FORWARD_WIDTH, BACKWARD_WIDTH = 16384, 8192
"""The widest row held in registers; beyond, a row is walked in pieces, since holding it would spill."""
PIECE = 4096
PASS_WIDTH = 1 << 17
"""The widest row of which one pass on a CPU adds up the squares: a longer sum in float32 would lose digits."""


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Rows of `x` (…, D) divided by their root mean square, times `weight` (D,); computed in float32."""
    x_wide = x.to(wide(x))
    inverse_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * inverse_rms * weight.to(x_wide.dtype)).to(x.dtype)


class _Eager(torch.autograd.Function):
    """Autograd function with a hand-written gradient: two thirds of the time that autograd takes step by step."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x_wide = x.to(wide(x))
        mean_square = torch.linalg.vecdot(x_wide, x_wide).div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_wide * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, inverse_rms = ctx.saved_tensors
        x_hat, g = x.to(inverse_rms.dtype) * inverse_rms, dy.to(inverse_rms.dtype)
        dweight = (g * x_hat).sum(tuple(range(x.dim() - 1))).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = g * weight
        mean = torch.linalg.vecdot(g, x_hat).div_(x.shape[-1]).unsqueeze(-1)
        return g.addcmul_(x_hat, mean, value=-1).mul_(inverse_rms).to(x.dtype), dweight, None


def _rms_norm_eager(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    if x.shape[-1] <= PASS_WIDTH and pointwise.is_supported(x, weight):
        return pointwise.norm(x, weight, eps)
    return _Eager.apply(x, weight, eps)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of `x` and `residual` (…, D), normalized as by `rms_norm`, and the sum itself: (normed, residual)."""
    residual = residual + x
    return _rms_norm(residual, weight, eps), residual


def _add_rms_norm_eager(x, residual, weight, eps=1e-6):
    if x.shape == residual.shape and x.shape[-1] <= PASS_WIDTH and pointwise.is_supported(x, residual, weight):
        return pointwise.add_norm(x, residual, weight, eps)
    residual = residual + x
    return _rms_norm_eager(residual, weight, eps), residual


# ---- fused ----


@triton.jit(do_not_specialize=["N"])
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, inverse_ptr,
    N, D, x_row, x_col, residual_row, residual_col, weight_col,
    eps: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: one read, one write."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    cols = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    mask = (rows < N) & (cols < D)
    x = tl.load(x_ptr + rows * x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + rows * residual_row + cols * residual_col, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * D + cols, rounded, mask=mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + cols * weight_col, mask=cols < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(inverse_ptr + row, inverse, mask=row < N)
    y = x * inverse[:, None] * weight
    tl.store(y_ptr + rows * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def rms_norm_wide_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, inverse_ptr,
    N, D, x_row, x_col, residual_row, residual_col, weight_col,
    eps: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row in pieces, twice: the second time it comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = cols < D
        x = tl.load(x_ptr + row * x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(residual_ptr + row * residual_row + cols * residual_col, mask=mask, other=0.0).to(tl.float32)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        squares += x * x
    inverse = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    tl.store(inverse_ptr + row, inverse)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = cols < D
        x = tl.load(x_ptr + row * x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(residual_ptr + row * residual_row + cols * residual_col, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * D + cols, rounded, mask=mask)
            x = rounded.to(tl.float32)
        weight = tl.load(weight_ptr + cols * weight_col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + cols, (x * inverse * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "rows_each"])
def rms_norm_bwd_kernel(
    x_ptr, weight_ptr, inverse_ptr, dy_ptr, dsum_ptr, dx_ptr, partial_ptr,
    N, D, rows_each, x_row, x_col, weight_col, dy_row, dy_col, dsum_row, dsum_col,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A run of rows a program: x and dy are read once and serve both dx and this program's share of dweight."""
    cols = tl.arange(0, BLOCK).to(tl.int64)
    inside = (cols < D)[None, :]
    weight = tl.load(weight_ptr + cols * weight_col, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, N)
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=2):  # the next rows arrive while these are worked on
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        rows = row[:, None]
        mask = (rows < last) & inside
        inverse = tl.load(inverse_ptr + row, mask=row < last, other=0.0)[:, None]
        x_hat = tl.load(x_ptr + rows * x_row + cols[None, :] * x_col, mask=mask, other=0.0).to(tl.float32) * inverse
        dy = tl.load(dy_ptr + rows * dy_row + cols[None, :] * dy_col, mask=mask, other=0.0).to(tl.float32)
        g = dy * weight
        dx = (g - x_hat * (tl.sum(g * x_hat, 1)[:, None] / D)) * inverse
        if ADD:
            dx += tl.load(dsum_ptr + rows * dsum_row + cols[None, :] * dsum_col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * D + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WEIGHT:
            share += dy * x_hat
    if WEIGHT:
        place = partial_ptr + tl.program_id(0).to(tl.int64) * D + cols
        tl.store(place, tl.sum(share, 0), mask=cols < D)


@triton.jit(do_not_specialize=["N"])
def rms_norm_wide_bwd_kernel(
    x_ptr, weight_ptr, inverse_ptr, dy_ptr, dsum_ptr, dx_ptr,
    N, D, x_row, x_col, weight_col, dy_row, dy_col, dsum_row, dsum_col,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row in pieces."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(inverse_ptr + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = cols < D
        x = tl.load(x_ptr + row * x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + cols * dy_col, mask=mask, other=0.0).to(tl.float32)
        products += dy * tl.load(weight_ptr + cols * weight_col, mask=mask, other=0.0).to(tl.float32) * x
    mean = tl.sum(products, 0) * inverse / D
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = cols < D
        x = tl.load(x_ptr + row * x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + cols * dy_col, mask=mask, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + cols * weight_col, mask=mask, other=0.0).to(tl.float32)
        dx = (g - x * inverse * mean) * inverse
        if ADD:
            dx += tl.load(dsum_ptr + row * dsum_row + cols * dsum_col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "rows_each"])
def rms_norm_wide_dw_kernel(
    x_ptr, inverse_ptr, dy_ptr, partial_ptr,
    N, D, rows_each, x_row, x_col, dy_row, dy_col, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight of one piece of columns over a run of rows."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * rows_each
    share = tl.zeros([BLOCK], tl.float32)
    for place in range(first, tl.minimum(first + rows_each, N)):
        row = tl.cast(place, tl.int64)
        x = tl.load(x_ptr + row * x_row + cols * x_col, mask=cols < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + cols * dy_col, mask=cols < D, other=0.0).to(tl.float32)
        share += dy * (x * tl.load(inverse_ptr + row))
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * D + cols, share, mask=cols < D)


def _tile(D: int, width: int) -> dict:
    """Rows and columns of a tile and its warps. By width alone: a row's result must not depend on its neighbors.

    Rows of odd widths are read a number at a time, each by an address of its own in two registers: fewer of them."""
    if width < D:
        return {"BLOCK": PIECE, "num_warps": 8}
    block = next_power_of_2(D)
    rows = max(1, min(32, (512 if D % 16 else 2048) // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(16, rows * block // 512))}


def _launch_forward(x, residual, weight, total, eps):
    rows = as_rows(x)
    N, D = rows.shape
    add = residual is not None
    other = as_rows(residual) if add else rows
    y = torch.empty(x.shape, dtype=total.dtype, device=x.device)
    inverse_N = torch.empty(N, dtype=torch.float32, device=x.device)
    tile = _tile(D, FORWARD_WIDTH)
    held = D <= FORWARD_WIDTH
    launch(
        rms_norm_fwd_kernel if held else rms_norm_wide_fwd_kernel,
        (cdiv(N, tile["ROWS"]) if held else N,),
        rows, other, weight, y, total, inverse_N,
        N, D, *rows.stride(), *other.stride(), *weight.stride(),
        eps=eps, ADD=add, **tile,
    )  # fmt: skip
    return y, inverse_N


@launcher
def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_forward(x, None, weight, x, eps)


@launcher
def add_rms_norm_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.empty(x.shape, dtype=torch.result_type(x, residual), device=x.device)
    y, inverse_N = _launch_forward(x, residual, weight, total, eps)
    return y, total, inverse_N


@launcher
def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_N: torch.Tensor,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, dy_rows = as_rows(x), as_rows(dy)
    N, D = rows.shape
    add = dsum is not None
    dsum_rows = as_rows(dsum) if add else dy_rows
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = max(1, min(sm_count(x.device) * (2 if D > 1024 else 4), N))
    rows_each = cdiv(N, programs)
    partial = torch.empty(programs if want_weight else 0, D, dtype=torch.float32, device=x.device)
    strides = (*dy_rows.stride(), *dsum_rows.stride())
    tile = _tile(D, BACKWARD_WIDTH)
    if D <= BACKWARD_WIDTH:
        launch(
            rms_norm_bwd_kernel, (programs,),
            rows, weight, inverse_N, dy_rows, dsum_rows, dx, partial,
            N, D, rows_each, *rows.stride(), *weight.stride(), *strides,
            ADD=add, WEIGHT=want_weight, **tile,
        )  # fmt: skip
    else:
        launch(
            rms_norm_wide_bwd_kernel, (N,),
            rows, weight, inverse_N, dy_rows, dsum_rows, dx,
            N, D, *rows.stride(), *weight.stride(), *strides,
            ADD=add, **tile,
        )  # fmt: skip
        if want_weight:
            launch(
                rms_norm_wide_dw_kernel, (cdiv(D, 512), programs),
                rows, inverse_N, dy_rows, partial,
                N, D, rows_each, *rows.stride(), *dy_rows.stride(), BLOCK=512, num_warps=4,
            )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if want_weight else partial


def _save_norm(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _norm_gradient(ctx, dy, _):
    if dy is None:
        return None, None, None
    x, weight, inverse_N = ctx.saved_tensors
    dx, dweight = rms_norm_backward(x, weight, inverse_N, dy, None, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None


def _save_sum(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])


def _sum_gradient(ctx, dy, dsum, _):
    total, weight, inverse_N = ctx.saved_tensors
    dweight = None
    if dy is not None:
        dsum, dweight = rms_norm_backward(total, weight, inverse_N, dy, dsum, ctx.needs_input_grad[2])
    if dsum is None:
        return None, None, None, None
    return *(dsum.to(dtype) for dtype in ctx.dtypes), dweight if ctx.needs_input_grad[2] else None, None


_norm = AutogradOp(rms_norm_forward, _save_norm, _norm_gradient)
_sum_and_norm = AutogradOp(add_rms_norm_forward, _save_sum, _sum_gradient)


def _rms_norm_fused(x, weight, eps=1e-6):
    return _norm(x, weight, eps)[0]


def _add_rms_norm_fused(x, residual, weight, eps=1e-6):
    return _sum_and_norm(x, residual, weight, eps)[:2]


def _cases(tensors: int) -> list[Case]:
    """The same cases for a norm of one tensor and of the sum of two."""

    def case(name, draw, *shape, **options):
        return Case(name, lambda m: (*(draw(m, *shape) for _ in range(tensors)), m.normal(shape[-1])), **options)

    return [
        case("tail", Maker.normal, 5, 100),
        case("one row", Maker.normal, 1, 64),
        case("no rows", Maker.normal, 0, 64),
        case("padded rows", Maker.padded, 2, 3, 48),
        case("every other column", Maker.strided, 3, 32),
        case("expanded gradient", Maker.normal, 4, 96, expanded=True),
        case("large magnitude", partial(Maker.normal, scale=1e4), 3, 128),
        case("wide", Maker.normal, 2, 17000),
        case("256K columns", Maker.normal, 1, 1 << 18),
        case("8192x4096", Maker.normal, 8192, 4096, bench=True),
    ]


rms_norm = Op(
    name="rms_norm",
    reference=_rms_norm,
    eager=_rms_norm_eager,
    native=True,
    fused=_rms_norm_fused,
    shapes="x ... D, weight D",
    rows=("x", "residual"),
    cases=_cases(1),
    traffic=lambda x, weight, eps=1e-6: (2 * x.nbytes, 3 * x.nbytes),
    budget=Budget(registers=128, vector=True),
    flops=lambda x, weight, eps=1e-6: (4 * x.numel(), 8 * x.numel()),
)

add_rms_norm = Op(
    name="add_rms_norm",
    reference=_add_rms_norm,
    eager=_add_rms_norm_eager,
    native=True,
    fused=_add_rms_norm_fused,
    shapes="x ... D, residual ... D, weight D",
    rows=("x", "residual"),
    cases=_cases(2),
    traffic=lambda x, residual, weight, eps=1e-6: (4 * x.nbytes, 4 * x.nbytes),
    budget=Budget(registers=128, vector=True),
    flops=lambda x, residual, weight, eps=1e-6: (5 * x.numel(), 9 * x.numel()),
)
