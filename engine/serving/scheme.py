"""Quantization schemes, the values of `quantize=`: bits, group size, and matrices kept at higher precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from ..errors import InputError
from ..formats.packed_weight import MATRICES, Layout

SMALL = 1_000_000_000  # parameters below which 4 bits leave the down products in 8: a third of the loss is theirs


@dataclass(frozen=True, slots=True)
class Scheme:
    """Quantization scheme for the weights of a float model."""

    bits: int = 8
    """Of a weight: 8 or 4."""
    group: int = 64
    """Columns that share a scale: 16, 32 or 64."""
    symmetric: bool = True
    """Without a minimum a group."""
    rotate: bool = True
    """Rounded after a Walsh-Hadamard transform of each 64 columns."""
    activations: int = 8
    """Bits of an activation: 8, or 16, which cost prefill and batches a third to a half, and nothing alone."""
    head: int = 8
    """Bits of the head's weights."""
    keep: Mapping[str, int] = field(default_factory=dict)
    """Bits of matrices by pattern, as {"*.down": 8}; names are those of MATRICES."""
    float8: bool = False
    """Codes of 8 bits are numbers in float8 (e4m3), on a GPU."""

    def __post_init__(self) -> None:
        if self.activations not in (8, 16):
            raise InputError(f"activations must be 8 or 16, got {self.activations}")
        for pattern in self.keep:
            if not any(fnmatch(name, pattern) for name in MATRICES):
                raise InputError(f"keep names no matrix by {pattern!r}; there are: {', '.join(MATRICES)}")
        for name in MATRICES:
            self.layout(name)

    def layout(self, name: str) -> Layout:
        """Layout of the matrix of this name."""
        bits = self.head if name == "head" else self.bits
        bits = next((kept for pattern, kept in self.keep.items() if fnmatch(name, pattern)), bits)
        return Layout(bits, self.group, not self.symmetric and bits == self.bits, (), self.rotate, self.float8)


INT8 = Scheme()
FP8 = Scheme(rotate=False, float8=True)


def scheme_of(quantize: str | Scheme | None, parameters: int, calibrated: bool = False) -> Scheme | None:
    """Look up a scheme by name, for a model of this many parameters.

    A head of 4 bits costs SmolLM2-135M KL 0.008 where it is calibrated, and 0.07 by the nearest codes.
    """
    if quantize is None or isinstance(quantize, Scheme):
        return quantize
    if quantize == "int8":
        return INT8
    if quantize == "fp8":
        return FP8
    if quantize == "int4":
        down = {"ffn.down": 8} if parameters < SMALL else {}
        return Scheme(4, symmetric=False, head=4 if calibrated else 8, keep={"ffn.router": 8, **down})
    raise InputError(f"quantize must be None, 'int8', 'int4', 'fp8' or a Scheme, got {quantize!r}")
