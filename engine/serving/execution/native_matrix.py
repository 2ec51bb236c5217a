"""Weight matrices of the C++ engine: float, or packed (quantized)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...formats.packed_weight import Layout, PackedLinear, PackedWeight, Segment, nibbles
from ...formats.rounding import nearest
from ..scheme import Scheme
from .kv_cache import HAS_NATIVE, _native


def keeps_packed(device: torch.device | str) -> bool:
    """Return whether products on this device run from packed weights."""
    return HAS_NATIVE if torch.device(device).type == "cpu" else torch.device(device).type == "cuda"


def stored(layer: Any) -> Tensor | PackedWeight:
    """Weight of a linear layer as stored: float or packed."""
    return layer.packed if isinstance(layer, PackedLinear) else layer.weight


def native_matrix(weight: Tensor | PackedWeight, bias: Tensor | None, form: str | Scheme, name: str):
    """C++ matrix of a weight: packed as it is, quantized by a `Scheme`, or in a float format."""
    if isinstance(weight, PackedWeight):
        return packed_matrix(weight, bias)
    rows, offset = _floats(weight), None if bias is None else _floats(bias)
    if isinstance(form, Scheme):
        return _native.PackedMatrix(rows, offset, native_layout(form.layout(name)), form.activations == 16)
    return _native.Matrix(form, rows, offset)


def packed_matrix(weight: PackedWeight, bias: Tensor | None = None, wide: bool = False):
    """C++ matrix of a packed weight."""
    parts = [(native_layout(s.layout), s.codes, s.scales, s.minima, s.units) for s in weight.segments]
    return _native.PackedMatrix(parts, weight.columns, None if bias is None else _floats(bias), wide)


def pack(weight: Tensor, layout: Layout, feedback: Tensor | None = None) -> PackedWeight:
    """Quantize a float weight (rows, columns) as the C++ engine does; with GPTQ `feedback`, calibrated.

    On a GPU without minima, in float8, and without the extension, by rounding to nearest."""
    near = layout.float8 or (weight.is_cuda and not layout.minimum)
    if _native is None or (near and feedback is None):
        return nearest(weight, layout).to(weight.device)
    count, columns = weight.shape
    groups = layout.groups(columns)
    codes = torch.empty(count, groups * layout.group, dtype=torch.uint8)
    scales, units = torch.empty(count, groups, dtype=torch.float16), torch.empty(count)
    minima = torch.empty_like(scales) if layout.minimum else None
    _native.quantize_rows(_floats(weight), native_layout(layout), codes, scales, minima, units, feedback)
    if layout.bits == 4:
        codes = nibbles(codes)
    return PackedWeight((Segment(layout, codes, scales, minima, units),), columns).to(weight.device)


def native_layout(layout: Layout):
    refuse_float8(layout.float8)
    return _native.Layout(layout.bits, layout.group, layout.minimum, layout.rotate, list(layout.table))


def refuse_float8(asked: bool) -> None:
    if asked:
        raise InputError("fp8 weights are for a GPU; on a CPU int8 is as small and loses less")


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
