"""Batch-invariant linear layer: a row's bits do not depend on the other rows of a batch.

y = x · Wᵀ + b is one call of cuBLAS, and training makes it. But cuBLAS chooses among its kernels by the number of rows,
and they sum in different orders: the last bits of a request's logits, and now and then its tokens, would depend on how
many others are in the batch. Here every output is one sum over the channels, from the first to the last, by the same
instruction. What the number of rows decides is only how many of them share a tile.

Decoding has few rows and is bound by reading W once. So its tile is a narrow stripe of W against all the rows, several
loads ahead of the product. Many rows are bound by arithmetic, and take tiles as large as registers allow. W's features
are the rows of each product and the tokens its columns: tensor cores want at least 64 of the former and 16 of the
latter.

Split-K. Stripes of 64 features are programs too few to read a narrow W as fast as memory goes: 16 of 1024 reach a third
of it. So the channels of a narrow W are cut into segments, as many as its shape says and never the number of rows:
each is a sum of its own, and they are added in order. Few rows give a program to every segment, and the last of these
to arrive adds; many rows go through all segments in one program, with a second accumulator.

M rows, C input channels, F output features.
"""

import math

import torch
import torch.nn.functional as nn

from .core.lang import cdiv, generation, tl, triton, wide
from .core.launch import AutogradOp, as_rows, last_dim_contiguous, launch, launcher
from .core.op import Budget, Case, Op
from .core.tuned import tuned
from .swiglu import activate


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer x (…, C) · weightᵀ + bias for a `weight` (F, C), accumulated in float32.

    `arrivals`, the weight's `arrival_counters`, spare the fused twin a launch and leave it no gradient."""
    y = nn.linear(x.to(wide(x)), weight.to(wide(x)), None if bias is None else bias.to(wide(x)))
    return y.to(x.dtype)


def _linear_eager(x, weight, bias=None, *, arrivals=None):
    return nn.linear(x, weight, bias)


# ---- fused ----

GROUP = 64
"""Features whose squares are summed as one part: the tile of few rows has as many."""
MANY = 256
"""Rows beyond which arithmetic takes longer than reading W."""
PROGRAMS = 64
"""Tiles with 48 KiB on the way each, which keep 4 TB/s busy over 0.7 µs: a narrower W is split into as many."""
SEGMENT = 256
"""Channels of a segment are a multiple of it, so that no tile's BLOCK_C crosses into another."""


@triton.jit
def _square_sums(y, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, HALVINGS: tl.constexpr):
    """Sums of squares of groups of features, pairwise: (ROWS, BLOCK_F / 2 / 2^HALVINGS).

    Sum by sum, for the order of a `tl.sum` follows the tile's layout, which follows the number of rows."""
    a, b = tl.split(tl.reshape(y, [ROWS, BLOCK_F // 2, 2]))
    sums = tl.fma(a, a, b * b)
    for level in tl.static_range(HALVINGS):
        a, b = tl.split(tl.reshape(sums, [ROWS, BLOCK_F // (4 << level), 2]))
        sums = a + b
    return sums


@triton.jit
def _segment(
    x_ptr, weight_ptr, m, f, M, F, x_row, weight_row, begin, end,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sum of a tile over the channels from `begin` to `end`."""
    total = tl.zeros([BLOCK_F, ROWS], tl.float32)
    for start in range(begin, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c >= 0) if WHOLE else (c < end)
        w_mask, x_mask = (f < F)[:, None] & inside[None, :], (m < M)[None, :] & inside[:, None]
        w = tl.load(weight_ptr + f[:, None] * weight_row + c[None, :], mask=w_mask, other=0.0)
        x = tl.load(x_ptr + m[None, :] * x_row + c[:, None], mask=x_mask, other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
    return total


@triton.jit
def _sum_in_order(total, partial_ptr, arrivals_ptr, SEGMENTS: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr):
    """Split-K sum in a fixed order: (the sum of a tile's segments, whether this program is the last to arrive).

    All segments are fetched at once."""
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    offsets = tl.arange(0, BLOCK_F).to(tl.int64)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    stored = partial_ptr + tile * (SEGMENTS * BLOCK_F * ROWS) + offsets
    tl.store(stored + tl.program_id(2).to(tl.int64) * (BLOCK_F * ROWS), total)
    tl.debug_barrier()  # all threads of this program have stored before one of them says so
    last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SEGMENTS - 1
    if last:
        tl.store(arrivals_ptr + tile, 0)  # for the next product
        total = tl.load(stored)
        for segment in tl.range(1, SEGMENTS, loop_unroll_factor=8):
            total += tl.load(stored + tl.cast(segment, tl.int64) * (BLOCK_F * ROWS))
    return total, last


@triton.jit
def tile_features(F, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr):
    """Features of this program's tile: contiguous, or with an ACTIVATION eight gates and their eight ups in turn, which
    one thread of the tensor core's tile holds together."""
    own = tl.arange(0, BLOCK_F)
    if ACTIVATION == "":
        f = tl.program_id(1).to(tl.int64) * BLOCK_F + own
    else:
        f = tl.program_id(1).to(tl.int64) * (BLOCK_F // 2) + (own // 16).to(tl.int64) * 8 + own % 8
        f = tl.where(f < F // 2, f + tl.where(own // 8 % 2 == 0, 0, F // 2), F)
    return f


@triton.jit
def rows_square_sum(squares_ptr, m, M, squares_row, squares_part, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Sums of squares of rows, from PARTS partial sums added in order."""
    square_sum = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, PARTS, loop_unroll_factor=4):
        at = squares_ptr + m * squares_row + tl.cast(part, tl.int64) * squares_part
        square_sum += tl.load(at, mask=m < M, other=0.0)
    return square_sum


@triton.jit
def finish_tile(
    total, square_sum, bias_ptr, stream_ptr, norm_ptr, sums_ptr, y_ptr,
    m, f, M, F, C, stream_row, sums_row, sums_part,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, JOIN: tl.constexpr,
    GROUP: tl.constexpr, HALVINGS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Epilogue of a product `total` (BLOCK_F, ROWS): bias, RMS division, gate, residual add; see `linear_kernel`."""
    if PARTS > 0:
        total *= tl.rsqrt(square_sum / C + EPS)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION != "":
        gate, up = tl.split(tl.permute(tl.reshape(total, [BLOCK_F // 16, 2, 8, ROWS]), [0, 2, 3, 1]))
        total = tl.reshape(activate(gate, ACTIVATION)[0] * up, [BLOCK_F // 2, ROWS])
        f = tl.program_id(1).to(tl.int64) * (BLOCK_F // 2) + tl.arange(0, BLOCK_F // 2)
        F = F // 2
    mask = (m < M)[:, None] & (f < F)[None, :]
    y = tl.trans(total)
    if JOIN:
        at = stream_ptr + m[:, None] * stream_row + f[None, :]
        joined = (y + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(y_ptr.dtype.element_ty)
        tl.store(at, joined, mask=mask)
        y = joined.to(tl.float32)
        part = tl.program_id(1).to(tl.int64) * (BLOCK_F // GROUP) + tl.arange(0, BLOCK_F // GROUP)
        sums = sums_ptr + m[:, None] * sums_row + part[None, :] * sums_part
        tl.store(sums, _square_sums(y, ROWS, BLOCK_F, HALVINGS), mask=(m < M)[:, None] & (part * GROUP < F)[None, :])
        y *= tl.load(norm_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * F + f[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "squares_part", "sums_part"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, squares_ptr, stream_ptr, norm_ptr, sums_ptr, partial_ptr, arrivals_ptr, y_ptr,
    M, F, C, segment, x_row, weight_row, squares_row, squares_part, stream_row, sums_row, sums_part,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE: tl.constexpr,
    PARTS: tl.constexpr, EPS: tl.constexpr, JOIN: tl.constexpr, GROUP: tl.constexpr, HALVINGS: tl.constexpr,
    SEGMENTS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of y, or with SPLIT one of its K segments. Tiles of the same features are adjacent in the grid, so that W
    is found in the cache.

    With an ACTIVATION, y has half of W's F features, gates · ups.

    With PARTS, the rows of x are divided by their root mean square: `squares` has the sums of its parts. With JOIN, the
    result is added to `stream`, in place; y is that by the next norm's weight, `sums` what its PARTS will be."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tile_features(F, ACTIVATION, BLOCK_F)
    square_sum = rows_square_sum(squares_ptr, m, M, squares_row, squares_part, PARTS, ROWS)
    total = tl.zeros([BLOCK_F, ROWS], tl.float32)
    if SPLIT:
        begin = tl.program_id(2) * segment
        end = tl.minimum(begin + segment, C)
        total = _segment(x_ptr, weight_ptr, m, f, M, F, x_row, weight_row, begin, end, WHOLE, ROWS, BLOCK_F, BLOCK_C)
    elif SEGMENTS == 1:
        total = _segment(x_ptr, weight_ptr, m, f, M, F, x_row, weight_row, 0, C, WHOLE, ROWS, BLOCK_F, BLOCK_C)
    else:
        for begin in range(0, C, segment):
            end = tl.minimum(begin + segment, C)
            total += _segment(
                x_ptr, weight_ptr, m, f, M, F, x_row, weight_row, begin, end, WHOLE, ROWS, BLOCK_F, BLOCK_C
            )
    if SPLIT:
        total, last = _sum_in_order(total, partial_ptr, arrivals_ptr, SEGMENTS, BLOCK_F, ROWS)
        if not last:
            return
    finish_tile(
        total, square_sum, bias_ptr, stream_ptr, norm_ptr, sums_ptr, y_ptr,
        m, f, M, F, C, stream_row, sums_row, sums_part,
        BIAS, ACTIVATION, PARTS, EPS, JOIN, GROUP, HALVINGS, ROWS, BLOCK_F,
    )  # fmt: skip


def segment_length(F: int, C: int) -> int:
    """Split-K segment length of a weight (F, C), in channels; by its shape alone, for batch invariance."""
    count = max(1, min(PROGRAMS // cdiv(max(F, 1), GROUP), C // SEGMENT, 8))
    return SEGMENT * cdiv(max(C, 1), SEGMENT * count)


def arrival_counters(weight: torch.Tensor) -> torch.Tensor | None:
    """Zeroed counters of finished split-K segments, for successive products with this weight; each leaves them zero.
    None for a weight that is not split."""
    F, C = weight.shape
    if segment_length(F, C) >= C:
        return None
    return torch.zeros(cdiv(MANY, 16) * cdiv(F, 16), dtype=torch.int32, device=weight.device)  # the least tiles


def _tile(name: str, x: torch.Tensor, M: int, split: bool) -> dict:
    """Tile: ROWS of x, BLOCK_F features, BLOCK_C channels at a time, by the number of rows."""
    arch = generation(x.device)
    many = 256 if arch >= 90 and not split else 128  # a second accumulator as large would not fit into registers
    size, rows = ("few", 16) if M <= 16 else ("some", 64) if M <= MANY else ("many", many)
    if arch == 0:
        rows, default = 16, {"BLOCK_F": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1}
    elif x.dtype == torch.float32:  # no tensor cores, whose order of summation is undocumented, hence one tile for all
        rows, default = 16, {"BLOCK_F": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3}
    elif size == "many":
        default = {
            "BLOCK_F": 64 if arch < 90 and split else 128,
            "BLOCK_C": 64,
            "num_warps": 8,
            "num_stages": 3 if arch >= 90 else 2,
        }
    else:
        default = {
            "BLOCK_F": 64,
            "BLOCK_C": 128 if arch < 100 else 64,
            "num_warps": 4,
            "num_stages": 4 if arch >= 90 else 3,
        }
    key = f"{size} {str(x.dtype)[6:]}{' split' if split else ''}"
    return {"ROWS": rows, **tuned(name, x.device, key, default)}


def product(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "",
    squares: tuple[torch.Tensor, float] | None = None,
    join: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    arrivals: torch.Tensor | None = None,
    whole: bool = False,
) -> torch.Tensor:
    """Launch x · weightᵀ + bias with the settings of op `name`, with an optional gate, norm and residual.

    `squares` (M, parts) and an eps divide x by its root mean square; `join` is a stream (M, F), in place, a norm's
    weight (F,) and room for the stream's own square sums. `arrivals`, zeros that stay so, spare a launch where channels
    are split: never if the sum is asked for as a `whole`."""
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: x is {x.dtype} and weight {weight.dtype}; they must be of one dtype")
    x_MC, weight = last_dim_contiguous(as_rows(x)), last_dim_contiguous(weight)
    (M, C), F = x_MC.shape, len(weight)
    y = torch.empty(*x.shape[:-1], F // 2 if activation else F, dtype=x.dtype, device=x.device)
    segment = max(C, 1) if whole else segment_length(F, C)
    segments = cdiv(max(C, 1), segment)
    tile = _tile(name, x, M, segments > 1)
    if join:
        tile["BLOCK_F"] = max(tile["BLOCK_F"], GROUP)
    sums, eps = squares or (x_MC, 0.0)
    if len(sums) != M:
        raise ValueError(f"{name}: {M} rows and square sums of {len(sums)}; they must be as many")
    stream, norm, room = join or (x_MC, x, x_MC)
    split = segments > 1 and M <= MANY
    grid = cdiv(M, tile["ROWS"]), cdiv(F, tile["BLOCK_F"]), segments if split else 1
    partial = x_MC
    if split:
        size = math.prod(grid) * tile["BLOCK_F"] * tile["ROWS"]
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        if arrivals is None or len(arrivals) < grid[0] * grid[1]:
            arrivals = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    launch(
        linear_kernel, grid,
        x_MC, weight, x if bias is None else bias, sums, stream, norm, room, partial, arrivals if split else x, y,
        M, F, C, segment, x_MC.stride(0), weight.stride(0), *sums.stride(), stream.stride(0), *room.stride(),
        BIAS=bias is not None, ACTIVATION=activation,
        WHOLE=math.gcd(C, segment if segments > 1 else C) % tile["BLOCK_C"] == 0,
        PARTS=sums.shape[1] if squares else 0, EPS=eps, JOIN=join is not None, GROUP=GROUP, HALVINGS=5,
        SEGMENTS=segments, SPLIT=split, **tile,
    )  # fmt: skip
    return y


@launcher
def linear_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product("linear", x, weight, bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    want_x, want_weight, want_bias = ctx.needs_input_grad
    rows = as_rows(dy)
    dx = dy @ weight if want_x else None
    dweight = rows.T @ as_rows(x) if want_weight else None
    return dx, dweight, None if bias is None or not want_bias else rows.sum(0).to(bias.dtype)


_product = AutogradOp(linear_forward, _save, _gradient)


@launcher(mutates=("arrivals",))
def linear_counted(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, arrivals: torch.Tensor
) -> torch.Tensor:
    return product("linear", x, weight, bias, arrivals=arrivals)


def _linear_fused(x, weight, bias=None, *, arrivals=None):
    return _product(x, weight, bias) if arrivals is None else linear_counted(x, weight, bias, arrivals)


def _batch(m, M, C, F, bias=False):
    return m.normal(M, C), m.normal(F, C, scale=C**-0.5), *([m.normal(F)] if bias else [])


def _moved(x, weight, bias=None):
    return x.nbytes + weight.nbytes + x.nbytes // x.shape[-1] * len(weight)


linear = Op(
    name="linear",
    reference=_linear,
    eager=_linear_eager,
    fused=_linear_fused,
    shapes="x ... C, weight F C, bias F",
    rows=("x",),
    autocast=True,
    cases=[
        Case("one row", lambda m: _batch(m, 1, 64, 48)),
        Case("bias and tails", lambda m: _batch(m, 3, 72, 40, bias=True)),
        Case("more than a tile", lambda m: _batch(m, 20, 64, 32)),
        Case("no rows", lambda m: _batch(m, 0, 32, 32)),
        Case("strided", lambda m: (m.strided(5, 40), m.strided(24, 40))),
        Case("batches", lambda m: (m.normal(2, 3, 32), m.normal(48, 32))),
        Case("narrow, channels split", lambda m: _batch(m, 3, 1100, 40, bias=True)),
        Case("large magnitude", lambda m: (m.normal(4, 64, scale=100.0), m.normal(32, 64))),
        Case("expanded gradient", lambda m: _batch(m, 6, 32, 32, bias=True), expanded=True),
        Case("1x1024x6144", lambda m: _batch(m, 1, 1024, 6144), bench=True),
        Case("1x3072x1024", lambda m: _batch(m, 1, 3072, 1024), bench=True),
        Case("1x4096x28672", lambda m: _batch(m, 1, 4096, 28672), bench=True),
        Case("64x4096x28672", lambda m: _batch(m, 64, 4096, 28672), bench=True),
        Case("64x2048x1024", lambda m: _batch(m, 64, 2048, 1024), bench=True),
        Case("8192x3072x1024", lambda m: _batch(m, 8192, 3072, 1024), bench=True),
        Case("8192x4096x4096", lambda m: _batch(m, 8192, 4096, 4096), bench=True),
    ],
    traffic=lambda *args, **__: (_moved(*args), 2 * _moved(*args)),
    flops=lambda x, weight, bias=None, **_: (2 * x.numel() * len(weight), 4 * x.numel() * len(weight)),
    budget=Budget(registers=255, vector=True, wgmma=True, copies=2, products=1),
)
