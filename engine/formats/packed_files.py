"""Packed weights in our own file format: the parts of a weight as separate tensors, its layout in config.json by kind
of matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from ..model import Transformer
from .packed_weight import MATRICES, PARTS, Layout, PackedExperts, PackedWeight, Segment, float8_finite, matrix_of
from .weights import Weights


def to_tensors(name: str, packed: PackedWeight | PackedExperts) -> Iterator[tuple[str, Tensor]]:
    """Yield a packed weight (one segment), or a layer's packed experts, as named tensors."""
    segments = [weight.segments[0] for weight in (packed if isinstance(packed, PackedExperts) else (packed,))]
    for part in PARTS:
        if getattr(segments[0], part) is not None:
            tensors = [getattr(segment, part) for segment in segments]
            yield f"{name}.{part}", torch.stack(tensors) if isinstance(packed, PackedExperts) else tensors[0]


def from_tensors(
    name: str, layout: Layout, shape: Sequence[int], read: Mapping[str, Tensor]
) -> PackedWeight | PackedExperts:
    """Read a packed weight from named tensors, checked against the model's shape."""
    *rows, columns = shape
    groups = layout.groups(columns)
    wanted = {
        "codes": (torch.uint8, (*rows, groups * layout.group * layout.bits // 8)),
        "scales": (torch.float16, (*rows, groups)),
        "minima": (torch.float16, (*rows, groups)),
        "units": (torch.float32, (*rows,)),
    }
    if not layout.minimum:
        del wanted["minima"]
    for part, (dtype, size) in wanted.items():
        tensor = read.get(f"{name}.{part}")
        if tensor is None:
            raise InputError(f"{name} has no {part}, which its layout calls for")
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            found = f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
            raise InputError(f"{name}.{part} is {found}; by its layout it is {dtype} {size}".replace("torch.", ""))
        if dtype.is_floating_point and not tensor.isfinite().all():
            raise InputError(f"{name}.{part} holds NaN or infinity")
    if layout.float8 and not float8_finite(read[f"{name}.codes"]):
        raise InputError(f"{name}.codes holds NaN")
    parts: Any = [read.get(f"{name}.{part}") for part in PARTS]
    if len(rows) == 1:
        return PackedWeight((Segment(layout, *parts),), columns)
    stack = Segment(layout, *parts)
    return PackedExperts(PackedWeight((stack.at(expert),), columns) for expert in torch.arange(rows[0]))


def packed_weights(weights: Weights, config: ModelConfig, said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the weights of a directory that `save_packed` wrote, packed and float ones."""
    layouts = layouts_from(said)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
    if config.tie_embeddings:
        shapes["head.weight"] = shapes["embedding.weight"]
    for name, shape in shapes.items():
        kind = matrix_of(name.removesuffix(".weight"))
        if f"{name}.codes" in weights.sources:
            if kind not in layouts:
                raise InputError(f"config.json: quantization_config has no layout of {kind!r}, which {name} needs")
            yield name, from_tensors(name, layouts[kind], shape, weights.parts(name))
            continue
        tensor = weights(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{weights.path}: {name} has shape {tuple(tensor.shape)}, by config.json {shape}")
        yield name, tensor
    if extra := weights.unread(config.n_layers):
        raise InputError(f"{weights.path} holds tensor {extra[0]!r}, which config.json does not account for")


def layouts_from(said: Mapping[str, Any]) -> dict[str, Layout]:
    """Layouts by kind of matrix, from the quantization_config of config.json."""
    layouts = said.get("layouts")
    if not isinstance(layouts, Mapping):
        raise InputError("config.json: quantization_config has no field 'layouts'")
    if strange := layouts.keys() - set(MATRICES):
        raise InputError(f"config.json: layouts names no matrix by {min(strange)!r}; there are: {', '.join(MATRICES)}")
    return {kind: layout_from(values) for kind, values in layouts.items()}


def layout_from(values: Any) -> Layout:
    """Parse a layout in config.json."""
    fields = {field.name for field in dataclasses.fields(Layout)}
    if not isinstance(values, Mapping) or not values.keys() <= fields:
        raise InputError(f"a layout in quantization_config has the fields {', '.join(sorted(fields))}, got {values!r}")
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    if any(type(value) is not type(getattr(Layout(), name)) for name, value in given.items()):
        raise InputError(f"a layout in quantization_config has values of other types than {Layout()!r}: {values!r}")
    return Layout(**given)
