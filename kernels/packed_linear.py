"""Linear layer with packed weights: 8- or 4-bit codes with a scale per group of columns.

When a model decodes one token at a time, each step reads every weight once and does almost nothing with it: the time is
the bytes. Codes of 4 bits and a scale of 16 for 64 of them are 0.27 of bfloat16's. A tile of codes is dequantized
to x's format on its way from memory to the product, so a weight means the same number in every batch:

    w = (code · scale + minimum) · unit        with a minimum
    w = table[code] · scale · unit             with a table of sixteen values
    w = (code - 128) · scale · unit            8 bits without; 4 bits: code - 8
    w = code · scale · unit                    8 bits in float8_e4m3fn, as the codes' dtype says

rounded once, and the product is that of `linear` on those numbers, bit for bit. Dequantizing is work for each tile
of rows, though; so for many rows the weight is dequantized once, and `linear` multiplies (Marlin, which does not, is
slower than 16 bits from 128 rows on).

Kernels convert float8 by its bits, which every GPU can, the NaN (127 and 255) to ±480: no weight has it.

Scales and minima are half precision, the unit of a row a power of two. Codes of 4 bits lie two a byte, the first in the
low half. With `rotate` the codes are of each 64 columns after a Walsh-Hadamard transform (QuaRot), and x is transformed
as well: the transform is its own inverse.

M rows, C input channels, F output features, G groups of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as nn

from .core.lang import cdiv, generation, tl, triton, wide
from .core.launch import AutogradOp, as_rows, last_dim_contiguous, launch, launcher
from .core.op import Budget, Case, Op
from .core.tuned import tuned
from .hadamard import hadamard_launch
from .linear import GROUP, finish_tile, product, rows_square_sum, tile_features

TURNED = 64  # columns that are rotated together
MANY = 256  # rows above which the weight is dequantized once


class PackedTensor(NamedTuple):
    """Packed rows of a weight: codes, scales, and the layout by which they are dequantized."""

    codes: torch.Tensor  # (F, G · group · bits / 8), bytes or float8
    scales: torch.Tensor  # (F, G), float16
    minima: torch.Tensor | None  # (F, G), float16
    units: torch.Tensor  # (F,), float32
    bits: int = 8
    group: int = 64
    table: Sequence[int] = ()
    rotate: bool = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self[:4] if part is not None)


def dequantize(weight: PackedTensor, columns: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Dequantize a packed weight to (F, columns), without the columns that pad the last group."""
    codes, scales, minima, units, bits, group, table, rotate = weight
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    codes_FGC = codes.unflatten(-1, (-1, group))
    if len(table):
        values = torch.tensor(table, dtype=dtype, device=codes.device)[codes_FGC.int()]
    else:
        signed = minima is not None or codes.dtype.is_floating_point
        values = codes_FGC.to(dtype) - (0 if signed else 1 << (bits - 1))
    w_FGC = values * (scales.to(dtype) * units.to(dtype)[:, None])[..., None]
    if minima is not None:
        w_FGC = w_FGC + (minima.to(dtype) * units.to(dtype)[:, None])[..., None]
    w_FC = w_FGC.flatten(1)
    return (rotated(w_FC) if rotate else w_FC)[:, :columns]


def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """Orthonormal Walsh-Hadamard matrix of size n (a power of two), symmetric and its own inverse."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x (…, C) with each 64 columns Hadamard-transformed, zero-padded to a multiple."""
    x = nn.pad(x, (0, -x.shape[-1] % TURNED))
    return (x.unflatten(-1, (-1, TURNED)) @ hadamard(TURNED, x.dtype, x.device)).flatten(-2)


def _packed_linear(x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, C) · weightᵀ + bias for a packed weight of F rows, accumulated in float32."""
    return _by_dtype(wide(x), x, weight, bias)


def _eager(x, weight, bias=None):
    return _by_dtype(x.dtype, x, weight, bias)


def _by_dtype(dtype, x, weight, bias):
    w_FC = dequantize(weight, x.shape[-1], torch.promote_types(dtype, torch.float32)).to(dtype)
    return nn.linear(x.to(dtype), w_FC, None if bias is None else bias.to(dtype)).to(x.dtype)


# ---- fused ----


@triton.jit
def dequantize_tile(
    codes_ptr, scales_ptr, minima_ptr, units_ptr, f, start, F, G, codes_row, scales_row, scales_column,
    BITS: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, WHOLE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Dequantize rows f and BLOCK_C columns from `start` on (a multiple of the block) to float32.

    FIRST and SECOND are a table's sixteen bytes, eight each. Codes in int8 are the bits of float8: sign, four of the
    exponent, three digits, which in half precision stand seven places higher."""
    BYTES: tl.constexpr = BLOCK_C * BITS // 8
    GROUPS: tl.constexpr = BLOCK_C // GROUP
    at = start // (8 // BITS) + tl.arange(0, BYTES).to(tl.int64)
    g = start // GROUP + tl.arange(0, GROUPS).to(tl.int64)
    row = (f < F)[:, None]
    inside = row if WHOLE else row & (at < codes_row)[None, :]
    known = row if WHOLE else row & (g < G)[None, :]
    codes = tl.load(codes_ptr + f[:, None] * codes_row + at[None, :], mask=inside, other=0)
    if BITS == 4:
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), [BLOCK_F, BLOCK_C])
    if TABLE:
        half = tl.where(codes < 8, tl.full([1, 1], FIRST, tl.int64), tl.full([1, 1], SECOND, tl.int64))
        values = (half >> ((codes & 7) * 8).to(tl.int64)).to(tl.int8).to(tl.float32)
    elif codes_ptr.dtype.element_ty == tl.int8:
        values = ((codes.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        values = codes.to(tl.float32) - (0 if MINIMUM else 128 if BITS == 8 else 8)
    unit = tl.load(units_ptr + f, mask=f < F, other=0.0)[:, None]
    places = f[:, None] * scales_row + g[None, :] * scales_column
    scale = tl.load(scales_ptr + places, mask=known, other=0.0).to(tl.float32) * unit
    w = tl.reshape(values, [BLOCK_F, GROUPS, GROUP]) * scale[:, :, None]
    if MINIMUM:
        least = tl.load(minima_ptr + places, mask=known, other=0.0).to(tl.float32) * unit
        w += least[:, :, None]
    return tl.reshape(w, [BLOCK_F, BLOCK_C])


@triton.jit(do_not_specialize=["M", "squares_part", "sums_part"])
def packed_linear_kernel(
    x_ptr, codes_ptr, scales_ptr, minima_ptr, units_ptr, bias_ptr, squares_ptr, stream_ptr, norm_ptr, sums_ptr, y_ptr,
    M, F, C, G, x_row, codes_row, scales_row, scales_column, squares_row, squares_part, stream_row, sums_row, sums_part,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, JOIN: tl.constexpr,
    FEATURES: tl.constexpr, HALVINGS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of y, as in `linear_kernel`, with fused norms and gate; tiles of the same features are adjacent."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tile_features(F, ACTIVATION, BLOCK_F)
    square_sum = rows_square_sum(squares_ptr, m, M, squares_row, squares_part, PARTS, ROWS)
    total = tl.zeros([BLOCK_F, ROWS], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c >= 0) if WHOLE else (c < C)
        x = tl.load(x_ptr + m[None, :] * x_row + c[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
        w = dequantize_tile(
            codes_ptr, scales_ptr, minima_ptr, units_ptr, f, start, F, G, codes_row, scales_row, scales_column,
            BITS, GROUP, MINIMUM, TABLE, FIRST, SECOND, WHOLE, BLOCK_F, BLOCK_C,
        )  # fmt: skip
        total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
    finish_tile(
        total, square_sum, bias_ptr, stream_ptr, norm_ptr, sums_ptr, y_ptr,
        m, f, M, F, C, stream_row, sums_row, sums_part,
        BIAS, ACTIVATION, PARTS, EPS, JOIN, FEATURES, HALVINGS, ROWS, BLOCK_F,
    )  # fmt: skip


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, minima_ptr, units_ptr, w_ptr, F, C, G, codes_row, scales_row, scales_column,
    BITS: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr, TABLE: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, WHOLE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Dequantize a tile of the weight (F, C) to w's dtype."""
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.program_id(1).to(tl.int64) * BLOCK_C
    w = dequantize_tile(
        codes_ptr, scales_ptr, minima_ptr, units_ptr, f, start, F, G, codes_row, scales_row, scales_column,
        BITS, GROUP, MINIMUM, TABLE, FIRST, SECOND, WHOLE, BLOCK_F, BLOCK_C,
    )  # fmt: skip
    c = start + tl.arange(0, BLOCK_C).to(tl.int64)
    inside = (f < F)[:, None] & (c < C)[None, :]
    tl.store(w_ptr + f[:, None] * C + c[None, :], w.to(w_ptr.dtype.element_ty), mask=inside)


def _tile(x: torch.Tensor, M: int) -> dict:
    """Tile: ROWS of x, BLOCK_F features, BLOCK_C channels at a time (a multiple of every group and of 64)."""
    arch = generation(x.device)
    if arch == 0:
        return {"ROWS": 16, "BLOCK_F": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1}
    size, rows = ("few", 16) if M <= 16 or x.dtype == torch.float32 else ("some", 64)
    default = {"BLOCK_F": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 4 if arch >= 90 else 3}
    return {"ROWS": rows, **tuned("packed_linear", x.device, f"{size} {str(x.dtype)[6:]}", default)}


def table_bytes(table: Sequence[int]) -> tuple[int, int]:
    """Pack a code table into two 8-byte integers."""
    packed = bytes(value & 255 for value in table).ljust(16, b"\0")
    return int.from_bytes(packed[:8], "little", signed=True), int.from_bytes(packed[8:], "little", signed=True)


def code_bits(codes: torch.Tensor) -> torch.Tensor:
    """Codes as kernels take them: float8 viewed as int8, whatever dtypes the GPU has."""
    return codes.view(torch.int8) if codes.dtype.is_floating_point else codes


def hadamard_rotated(x_MC: torch.Tensor) -> torch.Tensor:
    """`rotated` by the Hadamard kernel, on heads of 64 columns."""
    M, C = x_MC.shape
    x_MC = nn.pad(x_MC, (0, -C % TURNED)) if C % TURNED else x_MC
    return hadamard_launch(x_MC.reshape(M * x_MC.shape[1] // TURNED, TURNED), False).view(x_MC.shape)


def dequantize_arguments(weight: PackedTensor, columns: int) -> tuple[tuple, tuple, dict]:
    """Arguments of `dequantize_tile` for a packed weight of so many columns: tensors, strides, constants."""
    codes, scales, minima, units, bits, group, table, _ = weight
    F, held = len(scales), min(scales.shape[1] * group, codes.shape[1] * 8 // bits)
    if not len(codes) == len(units) == F or columns > held:
        raise ValueError(
            f"a packed weight of {len(codes)} rows of codes, {F} of scales, {len(units)} units and {held} columns must "
            f"have as many of each, and {columns} columns"
        )
    if minima is not None and minima.stride() != scales.stride():
        scales, minima = scales.contiguous(), minima.contiguous()
    codes, units, first, second = last_dim_contiguous(code_bits(codes)), units.contiguous(), *table_bytes(table)
    tensors = codes, scales, scales if minima is None else minima, units
    constants = {"BITS": bits, "GROUP": group, "MINIMUM": minima is not None, "TABLE": len(table) > 0}
    return tensors, (codes.stride(0), *scales.stride()), constants | {"FIRST": first, "SECOND": second}


def packed_product(
    x: torch.Tensor,
    weight: PackedTensor,
    bias: torch.Tensor | None,
    activation: str = "",
    squares: tuple[torch.Tensor, float] | None = None,
    join: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`linear.product` with a packed weight."""
    x_MC = last_dim_contiguous(as_rows(x))
    x_MC = hadamard_rotated(x_MC) if weight.rotate else x_MC
    (M, C), (F, G) = x_MC.shape, weight.scales.shape
    packed, strides, form = dequantize_arguments(weight, C)
    shape = *x.shape[:-1], F // 2 if activation else F
    if (bias is not None and len(bias) != F) or (squares and len(squares[0]) != M) or (join and len(join[1]) != F):
        raise ValueError(f"bias, norm weight and square sums must be those of {M} rows and {F} features")
    if M > MANY and C % 64 == 0:  # rows that cannot be read 16 bytes at a time would cost `linear` its registers
        tile = {"BLOCK_F": 16, "BLOCK_C": 64}
        dequantized = torch.empty(F, C, dtype=x.dtype, device=x.device)
        launch(
            dequantize_kernel, (cdiv(F, tile["BLOCK_F"]), cdiv(C, tile["BLOCK_C"])), *packed, dequantized, F, C, G,
            *strides, **form, WHOLE=True, **tile, num_warps=4,
        )  # fmt: skip
        name = "linear_residual" if join else "normed_linear" if squares else "linear"
        return product(name, x_MC, dequantized, bias, activation, squares, join, whole=True).view(shape)
    tile = _tile(x, M)
    if join:
        tile["BLOCK_F"] = max(tile["BLOCK_F"], GROUP)
    sums, eps = squares or (x_MC, 0.0)
    stream, norm, room = join or (x_MC, x, x_MC)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    launch(
        packed_linear_kernel, (cdiv(M, tile["ROWS"]), cdiv(F, tile["BLOCK_F"])),
        x_MC, *packed, x if bias is None else bias, sums, stream, norm, room, y, M, F, C, G,
        x_MC.stride(0), *strides, *sums.stride(), stream.stride(0), *room.stride(),
        BIAS=bias is not None, ACTIVATION=activation, PARTS=sums.shape[1] if squares else 0, EPS=eps,
        JOIN=join is not None, FEATURES=GROUP, HALVINGS=5, **form, WHOLE=C % tile["BLOCK_C"] == 0, **tile,
    )  # fmt: skip
    return y


# PyTorch's operators know no tuples of tensors and numbers: a packed weight comes to a launcher in its parts.


@launcher
def packed_linear_forward(
    x: torch.Tensor, bias: torch.Tensor | None,
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, units: torch.Tensor,
    bits: int, group: int, table: Sequence[int], rotate: bool,
) -> torch.Tensor:  # fmt: skip
    return packed_product(x, PackedTensor(codes, scales, minima, units, bits, group, table, rotate), bias)


def _save(ctx, inputs, output):
    x, bias, *tensors, bits, group, table, rotate = inputs
    ctx.layout, ctx.columns = (bits, group, table, rotate), x.shape[-1]
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    dtype, bias_dtype = ctx.dtypes
    want_x, want_bias, *rest = ctx.needs_input_grad
    weight = dequantize(PackedTensor(*ctx.saved_tensors, *ctx.layout), ctx.columns).to(dtype)
    dx = dy @ weight if want_x else None
    return dx, as_rows(dy).sum(0).to(bias_dtype) if want_bias else None, *[None] * len(rest)


_product = AutogradOp(packed_linear_forward, _save, _gradient)


def _fused(x, weight, bias=None):
    return _product(x, bias, *weight)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # MXFP4's numbers, doubled


def packed_batch(m, M, C, F, bits=8, group=64, minimum=False, table=(), rotate=False, bias=False, float8=False):
    """Test case: packed weight with scales and minima as a GPU reads them, group-major."""
    G = cdiv(C, max(group, TURNED if rotate else group)) * (TURNED // group if rotate else 1)
    codes = m.integers(0, 256, F, G * group * bits // 8, dtype=torch.uint8)
    codes = (codes & 0xBF).view(torch.float8_e4m3fn) if float8 else codes  # below two, and so no NaN
    scales = m.normal(G, F, scale=2.0 ** (0 if float8 else 1 - bits) * C**-0.5, dtype=torch.float16, grad=False).T
    minima = m.normal(G, F, scale=C**-0.5, dtype=torch.float16, grad=False).T if minimum else None
    units = m.tensor([1.0, 0.5] * F)[:F] if m.device.type != "meta" else torch.empty(F, device="meta")
    weight = PackedTensor(codes, scales, minima, units, bits, group, list(table), rotate)
    return m.normal(M, C), weight, *([m.normal(F)] if bias else [])


def _moved(x, weight, *_):
    return weight.nbytes + x.nbytes + x.nbytes // x.shape[-1] * len(weight.units)


packed_linear = Op(
    name="packed_linear",
    reference=_packed_linear,
    eager=_eager,
    fused=_fused,
    shapes="x ... C, bias F",
    rows=("x",),
    cases=[
        Case("one row", lambda m: packed_batch(m, 1, 64, 48)),
        Case("bias and tails", lambda m: packed_batch(m, 3, 72, 40, bias=True)),
        Case("4 bits", lambda m: packed_batch(m, 5, 128, 32, bits=4)),
        Case("4 bits, minima, tails", lambda m: packed_batch(m, 20, 96, 40, bits=4, group=32, minimum=True, bias=True)),
        Case("4 bits, rotated, tails", lambda m: packed_batch(m, 3, 72, 24, bits=4, minimum=True, rotate=True)),
        Case("table", lambda m: packed_batch(m, 3, 64, 32, bits=4, group=32, table=E2M1)),
        Case("groups of 16", lambda m: packed_batch(m, 3, 48, 32, group=16)),
        Case("many rows", lambda m: packed_batch(m, MANY + 3, 64, 64, bits=4, minimum=True, bias=True)),
        Case("many rows, table, rotated", lambda m: packed_batch(m, MANY + 3, 56, 64, 4, 32, table=E2M1, rotate=True)),
        Case("float8, tails", lambda m: packed_batch(m, 3, 72, 40, bias=True, float8=True)),
        Case("many rows, float8, rotated", lambda m: packed_batch(m, MANY + 3, 64, 64, rotate=True, float8=True)),
        Case("many rows, tails", lambda m: packed_batch(m, MANY + 3, 40, 24, 8, 16, minimum=True)),
        Case("no rows", lambda m: packed_batch(m, 0, 64, 32)),
        Case("1x4096x14336", lambda m: packed_batch(m, 1, 4096, 14336), bench=True),
        Case("1x4096x14336, float8", lambda m: packed_batch(m, 1, 4096, 14336, float8=True), bench=True),
        Case("1x4096x14336, 4 bits", lambda m: packed_batch(m, 1, 4096, 14336, 4, minimum=True), bench=True),
        Case(
            "1x4096x14336, 4 bits rotated", lambda m: packed_batch(m, 1, 4096, 14336, 4, 64, True, (), True), bench=True
        ),
        Case("64x4096x14336, table", lambda m: packed_batch(m, 64, 4096, 14336, 4, 32, table=E2M1), bench=True),
        Case("64x4096x14336, groups of 16", lambda m: packed_batch(m, 64, 4096, 14336, 8, 16), bench=True),
        Case("4096x4096x4096, 4 bits", lambda m: packed_batch(m, 4096, 4096, 4096, 4, minimum=True), bench=True),
    ],
    traffic=lambda *args, **_: (_moved(*args), _moved(*args)),
    budget={
        "packed_linear_kernel": Budget(registers=168, vector=True, wgmma=True, copies=2, products=1),
        "dequantize_kernel": Budget(registers=64, vector=True),
        "hadamard_heads_kernel": Budget(registers=96, vector=True),
        "linear_kernel": Budget(registers=255, vector=True, wgmma=True, copies=2, products=1),
    },
    flops=lambda x, weight, *_, **__: (2 * x.numel() * len(weight.units), 2 * x.numel() * len(weight.units)),
)
