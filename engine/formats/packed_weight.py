"""Packed weights: 8- or 4-bit codes with a scale for each group of columns of a row (group-wise quantization).

`kernels/packed_linear.py` has the formula, and the product on a GPU; csrc/cpu/serving/packed_matrix.cpp that on a CPU.
Scales and minima are half precision; the unit is a power of two of the row. With `rotate`, each 64 columns were
multiplied by a Walsh-Hadamard matrix before rounding, which spreads outliers.

A matrix is a list of segments of rows: q, k and v, stored apart and perhaps in different formats, multiply as one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels import moe, packed_moe
from ...kernels.packed_linear import TURNED, PackedTensor, dequantize, packed_linear
from ..errors import InputError
from ..layers import MoE
from ..model import Transformer
from ..parallel.tensor_parallel import ShardedLinear, ShardSpec

MATRICES = "attention.qkv", "attention.output", "ffn.up", "ffn.down", "ffn.router", "head"
NAMES = {name.rpartition(".")[2]: name for name in MATRICES} | {"w_down": "ffn.down"}
PARTS = "codes", "scales", "minima", "units"
GROUPS = 16, 32, 64


def matrix_of(path: str) -> str:
    """Kind of matrix (a member of MATRICES) of a layer's path: blocks.3.attention.qkv → attention.qkv."""
    return NAMES.get(path.rpartition(".")[2], "ffn.up")


@dataclass(frozen=True, slots=True)
class Layout:
    """Quantization format: bits, group size, minima, code table, Hadamard rotation; 8-bit codes may be float8."""

    bits: int = 8
    group: int = 64
    minimum: bool = False
    table: tuple[int, ...] = ()
    rotate: bool = True
    float8: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"bits must be 4 or 8, got {self.bits}")
        if self.group not in GROUPS:
            raise InputError(f"group must be 16, 32 or 64, got {self.group}")
        if self.table and (len(self.table) != 16 or self.bits != 4 or self.minimum):
            raise InputError("table must have 16 values, for 4 bits and no minimum")
        if self.float8 and (self.bits != 8 or self.minimum):
            raise InputError(f"float8 must be of 8 bits and without a minimum, got {self.bits} bits")

    def __str__(self) -> str:
        extra = {", with minima": self.minimum, ", by a table": self.table, ", rotated": self.rotate}
        return self.kind + "".join(text for text, given in extra.items() if given)

    @property
    def kind(self) -> str:
        return f"{'float8' if self.float8 else f'{self.bits} bits'} in groups of {self.group}"

    def groups(self, columns: int) -> int:
        """Groups of a row; with rotation, of columns padded to a multiple of 64."""
        return -(-columns // TURNED) * (TURNED // self.group) if self.rotate else -(-columns // self.group)


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows with one layout. N rows, G groups."""

    layout: Layout
    codes: Tensor  # uint8 (N, G · group · bits / 8)
    scales: Tensor  # float16 (N, G)
    minima: Tensor | None  # float16 (N, G)
    units: Tensor  # float32 (N)

    def in_groups(self, group: int) -> Segment:
        """Split groups into smaller ones that repeat their scale."""
        times = self.layout.group // group
        if times == 1:
            return self
        layout = dataclasses.replace(self.layout, group=group)
        return Segment(layout, self.codes, *self._of_groups(lambda x: x.repeat_interleave(times, 1)), self.units)

    def at(self, rows: Tensor | slice) -> Segment:
        """Select rows, in this order."""
        return Segment(self.layout, self.codes[rows], *self._of_groups(lambda x: x[rows]), self.units[rows])

    def between(self, first: int, last: int) -> Segment:
        """Select columns; both ends must be ends of groups."""
        layout = self.layout
        start, count = first // layout.group, layout.groups(last - first)
        groups, size = slice(start, start + count), layout.group * layout.bits // 8
        codes = self.codes[:, start * size : (start + count) * size].contiguous()
        return Segment(layout, codes, *self._of_groups(lambda x: x[:, groups].contiguous()), self.units)

    def dequantize(self, columns: int | None = None) -> Tensor:
        """The rows in float32, without the columns that pad the last group."""
        return dequantize(self.tensor, columns)

    def to(self, device: torch.device | str) -> Segment:
        """Copy to a device; on a GPU scales and minima are stored group-major, as the kernel reads them."""
        host = torch.device(device).type == "cpu"
        scales_and_minima = self._of_groups(
            lambda x: x.to(device).contiguous() if host else x.T.contiguous().to(device).T
        )
        return Segment(self.layout, self.codes.to(device), *scales_and_minima, self.units.to(device))

    def _of_groups(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Apply `change` to scales and minima."""
        return change(self.scales), None if self.minima is None else change(self.minima)

    @property
    def tensor(self) -> PackedTensor:
        """The rows as the kernels' `PackedTensor`."""
        layout = self.layout
        codes = self.codes.view(torch.float8_e4m3fn) if layout.float8 else self.codes
        form = layout.bits, layout.group, layout.table, layout.rotate
        return PackedTensor(codes, self.scales, self.minima, self.units, *form)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x · rowsᵀ + bias from the packed codes."""
        return packed_linear(x, self.tensor, bias)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight (rows, columns): segments of one group size."""

    segments: tuple[Segment, ...]
    columns: int

    @classmethod
    def joined(cls, segments: Sequence[Segment], columns: int) -> PackedWeight:
        """Concatenate segments to one weight of the smallest group size; adjacent ones of one layout are merged."""
        group, found = min(segment.layout.group for segment in segments), []
        for _, alike in groupby((segment.in_groups(group) for segment in segments), key=lambda each: each.layout):
            first, *rest = alike
            if rest:
                parts: Any = ([getattr(each, part) for each in (first, *rest)] for part in PARTS)
                joined: Any = [None if each[0] is None else torch.cat(each) for each in parts]
                first = Segment(first.layout, *joined)
            found.append(first)
        return cls(tuple(found), columns)

    def dequantize(self) -> Tensor:
        """The weight in float32: the reference that packed products are tested against."""
        return torch.cat([segment.dequantize(self.columns) for segment in self.segments])

    def at(self, rows: Tensor) -> PackedWeight | None:
        """Select rows, in this order; None if that reorders rows across segments."""
        if len(self.segments) > 1 and bool((rows.diff() < 0).any()):
            return None
        found, first = [], 0
        for segment in self.segments:
            last = first + len(segment.units)
            mine = rows[(rows >= first) & (rows < last)] - first
            found += [segment.at(mine)] if len(mine) else []
            first = last
        return PackedWeight(tuple(found), self.columns)

    def between(self, first: int, last: int) -> PackedWeight | None:
        """Select columns, in smaller groups if need be; None where no group size fits."""
        ends = first, 0 if last == self.columns else last
        steps = (TURNED if segment.layout.rotate else GROUPS[0] for segment in self.segments)
        if any(end % step for step in steps for end in ends):
            return None
        finer = (segment.in_groups(gcd(segment.layout.group, *ends)) for segment in self.segments)
        return PackedWeight(tuple(segment.between(first, last) for segment in finer), last - first)

    def __deepcopy__(self, memo: dict) -> PackedWeight:
        return self  # is never written

    def to(self, device: torch.device | str) -> PackedWeight:
        return PackedWeight(tuple(segment.to(device) for segment in self.segments), self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(segment.units) for segment in self.segments), self.columns

    @property
    def nbytes(self) -> int:
        return sum(segment.tensor.nbytes for segment in self.segments)


class PackedLinear(nn.Module):
    """Linear layer with a packed weight: the fused kernel on a GPU, dequantization elsewhere."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias

    @property
    def weight(self) -> Tensor:
        """The weight in float32, dequantized on every access."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        sizes = [len(segment.units) for segment in self.packed.segments]
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        parts = [segment.multiply(x, bias) for segment, bias in zip(self.packed.segments, biases)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _apply(self, fn, recurse=True):
        """Move with the module (`.to`); a change of dtype does not apply to codes."""
        probe = self.packed.segments[0].codes[:0]
        self.packed = self.packed.to(fn(probe).device)
        return super()._apply(fn, recurse)


class PackedExperts(tuple[PackedWeight, ...]):
    """Packed matrices of a layer's experts; for the kernels concatenated into one `stack`."""

    stack: Segment | None = None

    def dequantize(self) -> Tensor:
        return torch.stack([packed.dequantize() for packed in self])

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return found
        return PackedExperts(found) if self.stack is None else PackedExperts(found).stacked(self.stack.codes.device)

    @property
    def alike(self) -> bool:
        """Return whether all experts have one layout, so that they can be stacked."""
        return len({segment.layout for packed in self for segment in packed.segments}) == 1

    def stacked(self, device: torch.device | str = "cpu") -> PackedExperts:
        """Copy to a device as one stack, if all have one layout."""
        if not self.alike:
            return PackedExperts(packed.to(device) for packed in self)
        columns = self[0].columns
        joined = PackedWeight.joined([segment for packed in self for segment in packed.segments], columns)
        stack = joined.segments[0].to(device)
        places = torch.arange(len(stack.units)).split(len(stack.units) // len(self))
        rows = [slice(int(each[0]), int(each[-1]) + 1) for each in places]
        found = PackedExperts(PackedWeight((stack.at(each),), columns) for each in rows)
        found.stack = stack
        return found

    def to(self, device: torch.device | str) -> PackedExperts:
        if torch.device(device).type != "cpu":
            return self.stacked(device)
        return PackedExperts(packed.to(device) for packed in self)

    def __deepcopy__(self, memo: dict) -> PackedExperts:
        return self  # is never written


def expert_product(x: Tensor, logits: Tensor, w_gate_up: Any, w_down: Any, top_k: int, **options) -> Any:
    """`kernels.moe` with packed experts: the fused kernel where they are stacked, else dequantized."""
    up, down = getattr(w_gate_up, "stack", None), getattr(w_down, "stack", None)
    if up is not None and down is not None:
        return packed_moe(x, logits, up.tensor, down.tensor, len(w_down), top_k, **options)
    up, down = (part.dequantize().to(x) if isinstance(part, PackedExperts) else part for part in (w_gate_up, w_down))
    return moe(x, logits, up, down, top_k, **options)


def packed_in(model: nn.Module) -> Iterator[tuple[str, PackedWeight | PackedExperts]]:
    """Yield every packed weight of a model by name."""
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            yield f"{path}.weight", layer.packed
        elif isinstance(layer, MoE):
            found = ((name, getattr(layer, name)) for name in ("w_gate_up", "w_down"))
            yield from ((f"{path}.{name}", x) for name, x in found if isinstance(x, PackedExperts))


def is_packed(model: nn.Module) -> bool:
    return next(packed_in(model), None) is not None


def describe(model: nn.Module) -> str | None:
    """One line on the packed and the float weights with their bytes; None if nothing is packed."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _, found in packed_in(model):
        for packed in found if isinstance(found, PackedExperts) else (found,):
            kind = " and ".join(sorted({segment.layout.kind for segment in packed.segments}))
            sizes[kind] += packed.nbytes
            counts[kind] += 1
    if not sizes:
        return None
    packed = "; ".join(f"{counts[kind]} matrices of {kind}, {size / 1e6:,.1f} MB" for kind, size in sizes.items())
    floats = sum(parameter.nbytes for parameter in model.parameters())
    return f"packed: {packed}; dequantized or never packed: {floats / 1e6:,.1f} MB"


def install(model: nn.Module, name: str, packed: PackedWeight | PackedExperts) -> None:
    """Replace a weight of the model by a packed one."""
    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    if isinstance(packed, PackedExperts):
        layer = cast("MoE", model.get_submodule(parent))
        layer.product = expert_product
        if not isinstance(getattr(layer, leaf), PackedExperts):
            delattr(layer, leaf)
        setattr(layer, leaf, packed)
        return
    layer = getattr(model.get_submodule(parent), leaf)  # None: the head of a tied embedding
    if isinstance(layer, ShardedLinear):
        layer.packed, layer.weight = PackedLinear(packed), cast(Any, None)
        return
    setattr(model.get_submodule(parent), leaf, PackedLinear(packed, getattr(layer, "bias", None)))


def dequantize_lone_experts(model: Transformer) -> None:
    """Dequantize experts of layers whose two matrices are not both stacked: the kernel takes both or none, and they
    would otherwise be dequantized anew at each step."""
    for layer in model.modules():
        if not isinstance(layer, MoE) or layer.product is not expert_product:
            continue
        parts = {name: getattr(layer, name) for name in ("w_gate_up", "w_down")}
        if all(getattr(part, "stack", None) is not None for part in parts.values()):
            continue
        layer.product = None
        for name, part in parts.items():
            if isinstance(part, PackedExperts):
                delattr(layer, name)
                setattr(layer, name, nn.Parameter(part.dequantize().to(model.embedding.weight), requires_grad=False))


def share_of(
    weight: PackedWeight | PackedExperts, spec: ShardSpec, rank: int, size: int
) -> PackedWeight | PackedExperts | Tensor:
    """Tensor-parallel shard of a packed weight (of each expert); floats if the cut splits a group."""
    if spec.tp is None:
        return weight
    if isinstance(weight, PackedExperts):
        each = dataclasses.replace(spec, tp=spec.tp - 1)
        shares: Any = [share_of(expert, each, rank, size) for expert in weight]
        packed = all(isinstance(share, PackedWeight) for share in shares)
        return PackedExperts(shares) if packed else spec.cut(weight.dequantize(), rank, size)
    places = spec.cut(torch.arange(weight.shape[spec.tp]), rank, size, 0)
    if spec.tp == 0:
        found = weight.at(places)
    else:
        found = weight.between(int(places[0]), int(places[-1]) + 1)
    return spec.cut(weight.dequantize(), rank, size) if found is None else found


def nibbles(codes: Tensor) -> Tensor:
    """Pack two 4-bit codes a byte, the first in the low half."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def row_units(scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """Power of two for each row that keeps its scales and minima within float16's normal range."""
    largest = scales.abs().amax(1)
    if minima is not None:
        largest = largest.maximum(minima.abs().amax(1))
    return torch.ldexp(torch.ones(len(scales)), torch.frexp(largest).exponent - 15)


def float8_finite(codes: Tensor) -> bool:
    """Return whether codes in float8_e4m3fn hold no NaN; the format has no infinity."""
    return not bool((codes.view(torch.uint8) & 127 == 127).any())
