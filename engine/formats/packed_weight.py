"""Weights of 8 or 4 bits as they are kept: codes, and a scale for each group of columns of a row.

    w = (code · scale + minimum) · unit        with a minimum
    w = table[code] · scale · unit             with a table of sixteen values
    w = (code - 128) · scale · unit            8 bits without; 4 bits: code - 8

Scales and minima are half precision; the unit is a power of two of the row, or a scale of its own. With `rotate` that
is the weight in a basis in which outliers are spread: each 64 columns after a Walsh-Hadamard transform, which is its
own inverse (csrc/cpu/serving/hadamard.hpp). Codes of 4 bits lie two a byte, the first in the low half.

A matrix is a list of segments of rows: what files store apart, and in different formats, multiplies as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

TURNED = 64  # columns that are rotated together


@dataclass(frozen=True, slots=True)
class Layout:
    """Encoding of a segment: bits, group, minimum, table, rotation."""

    bits: int = 8
    group: int = 64
    minimum: bool = False
    table: tuple[int, ...] = ()
    rotate: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"bits must be 4 or 8, got {self.bits}")
        if self.group not in (16, 32, 64):
            raise InputError(f"group must be 16, 32 or 64, got {self.group}")
        if self.table and (len(self.table) != 16 or self.bits != 4 or self.minimum):
            raise InputError("table must have 16 values, for 4 bits and no minimum")

    def groups(self, columns: int) -> int:
        """Of a row: whole spans where it is rotated."""
        return -(-columns // TURNED) * (TURNED // self.group) if self.rotate else -(-columns // self.group)


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one layout: N rows, G groups."""

    layout: Layout
    codes: Tensor  # uint8 (N, G · group · bits / 8)
    scales: Tensor  # float16 (N, G)
    minima: Tensor | None  # float16 (N, G)
    units: Tensor  # float32 (N)

    def dequantize(self, columns: int) -> Tensor:
        """The rows in float32."""
        layout, codes = self.layout, self.codes
        if layout.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        codes_NGC = codes.unflatten(-1, (-1, layout.group))
        if layout.table:
            values = torch.tensor(layout.table, dtype=torch.float32)[codes_NGC.int()]
        else:
            values = codes_NGC.float() - (0 if layout.minimum else 1 << (layout.bits - 1))
        w_NGC = values * self.scales.float()[..., None]
        if self.minima is not None:
            w_NGC = w_NGC + self.minima.float()[..., None]
        w_NC = w_NGC.flatten(1) * self.units[:, None]
        if layout.rotate:
            w_NC = (w_NC.unflatten(-1, (-1, TURNED)) @ hadamard(TURNED)).flatten(1)
        return w_NC[:, :columns]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight (rows, columns) in segments whose groups have one size."""

    segments: tuple[Segment, ...]
    columns: int

    def dequantize(self) -> Tensor:
        """The weight in float32: the definition that products are held to."""
        return torch.cat([segment.dequantize(self.columns) for segment in self.segments])

    @property
    def nbytes(self) -> int:
        tensors = (t for s in self.segments for t in (s.codes, s.scales, s.minima, s.units) if t is not None)
        return sum(tensor.nbytes for tensor in tensors)


def hadamard(n: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix of a power of two, symmetric and its own inverse."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5
