"""Safetensors reader: memory-mapped tensors by published name, FP8 and MXFP4 dequantized or kept packed.

Two formats are dequantized on reading unless they are kept packed: FP8 with a scale a tensor, a row, or a block (128 by
128 in DeepSeek-V3 and Qwen3-FP8; MXFP8 has 1 by 32), and MXFP4, blocks of 32 4-bit numbers with a power-of-two scale
(gpt-oss).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.packed_linear import E2M1
from ..errors import InputError
from .family import WeightMapping
from .packed_checkpoints import METHODS, groups_of, read_integers
from .packed_weight import Layout, PackedExperts, PackedWeight, Segment, float8_finite, row_units

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
UNPACKED = ("fp8", "mxfp4", *METHODS, "fbgemm_fp8", "warploom")
SCALES = "_scale_inv", "_scale"  # behind the name of a tensor in FP8
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# Where a multimodal model keeps its language model, in front of "model." or instead of it.
TOWERS = ("language_model.model.", "model.language_model.", "language_model.", "model.text_model.")

OTHER_TOWERS = ("visual.", "model.visual.", "vision_tower.", "multi_modal_projector.")


class Weights:
    """Published tensors by name, read from memory-mapped files on first use."""

    keeps_fp8 = False  # whether FP8 stays packed, as the GPU's kernels read it

    def __init__(self, sources: Mapping[str, Any], path: Path, quantization: Mapping[str, Any] | None = None) -> None:
        self.sources, self.path, self.quantization = sources, path, quantization or {}
        self.read: set[str] = set()
        self.tower = next((tower for tower in TOWERS if any(name.startswith(tower) for name in sources)), None)

    def __call__(self, name: str) -> Tensor:
        integers = self._integers(name)
        if integers is not None:
            return integers if isinstance(integers, Tensor) else integers.dequantize()
        found = self._find(name)
        if found is None:
            blocks = self._find(f"{name}_blocks")
            if blocks is None:
                raise InputError(f"{self.path} has no tensor {name!r}, which config.json calls for")
            return mxfp4(*self._blocks(blocks))
        tensor = self._take(found)
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{self.path}: tensor {found} is {kind}: packed, and without the scales that unpack it")
        if tensor.dtype not in FP8:
            return tensor
        for suffix in SCALES:
            if found + suffix in self.sources:
                return fp8(tensor, self._take(found + suffix), found, fp8_block(self.quantization))
        raise InputError(f"{self.path}: tensor {found} is in FP8 and has no scale")

    def _blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes and scales of MXFP4, their shapes checked against each other."""
        codes, scales = self._take(name), self._take(f"{name.removesuffix('_blocks')}_scales")
        whole = codes.dtype == scales.dtype == torch.uint8 and codes.ndim == 4 and codes.shape[3] == 16
        if not whole or scales.shape != codes.shape[:3]:
            found = " and ".join(f"{part.dtype} {tuple(part.shape)}" for part in (codes, scales)).replace("torch.", "")
            raise InputError(
                f"{self.path}: {name} and its scales are {found}, not blocks of 16 bytes and a byte for each"
            )
        return codes, scales

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor has once it is dequantized."""
        base = name.removesuffix(".weight")
        for part in (name, f"{base}.scales", f"{base}.weight_scale"):  # of quantized weights, the dtype of the scales
            found = self._find(part)
            stored = None if found is None else self._stored(found)
            if stored is not None and stored.is_floating_point:
                return torch.bfloat16 if stored in FP8 else stored
        return torch.bfloat16

    def _stored(self, found: str) -> torch.dtype:
        source = self.sources[found]
        if isinstance(source, Tensor):
            return source.dtype
        part = source.get_slice(found)
        return (part[:0] if part.get_shape() else source.get_tensor(found)).dtype

    def packed(self, name: str) -> Segment | None:
        """A published matrix in packed form; None where it is not quantized or has to be dequantized."""
        integers = self._integers(name)
        found = self._find(name) if self.keeps_fp8 and integers is None else None
        if found is not None and self._stored(found) == torch.float8_e4m3fn:
            scale = next((found + suffix for suffix in SCALES if found + suffix in self.sources), None)
            block = fp8_block(self.quantization)
            return None if scale is None else fp8_rows(self._take(found), self._take(scale), found, block)
        return integers if isinstance(integers, Segment) else None

    def _integers(self, name: str) -> Segment | Tensor | None:
        if self.quantization.get("quant_method") not in METHODS or not name.endswith(".weight"):
            return None
        has, take = lambda part: self._find(part) is not None, lambda part: self._take(self._found(part))
        return read_integers(name, has, take, self.quantization)

    def _found(self, name: str) -> str:
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.path} has no tensor {name!r}, which its neighbor needs")
        return found

    def as_packed(self, piece: WeightMapping, shape: Sequence[int]) -> PackedWeight | PackedExperts | None:
        """One of our matrices (or one for each expert) in packed form; None unless all its published parts have one."""
        if len(shape) == 3 and not piece.stacked:
            return self._whole_experts(piece, shape)
        if piece.transposed or piece.framed or piece.offset:
            return None
        found: list[PackedWeight] = []
        for names in piece.groups:
            packed = self._joined(names, piece, shape[-2:])
            if packed is None:
                return None  # the reader of floats says what is wrong
            found.append(packed)
        return PackedExperts(found) if piece.stacked else found[0]

    def _joined(self, names: Sequence[str], piece: WeightMapping, shape: Sequence[int]) -> PackedWeight | None:
        segments: list[Segment] = []
        for name in names:
            segment = self.packed(name)
            if segment is None:
                return None
            segments.append(segment)
        rows = piece.sizes if len(segments) > 1 else shape[:1]
        fits = all(
            len(s.units) == n and s.scales.shape[1] * s.layout.group == shape[-1] for s, n in zip(segments, rows)
        )
        packed = PackedWeight.joined(segments, shape[-1]) if fits else None
        return packed if piece.order is None or packed is None else packed.at(piece.order)

    def _whole_experts(self, piece: WeightMapping, shape: Sequence[int]) -> PackedExperts | None:
        """gpt-oss's MXFP4 experts, all in one tensor; blocks run along rows, though floats are published transposed."""
        blocks = self._find(f"{piece.theirs[0]}_blocks")
        E, rows, columns = shape
        if blocks is None or columns % 32:
            return None
        codes, scales = self._blocks(blocks)
        if codes.shape[:3] != (E, rows, columns // 32):
            return None
        segments = [mxfp4_rows(*expert) for expert in zip(codes, scales)]
        if any(segment is None for segment in segments):
            return None
        order = slice(None) if piece.order is None else piece.order
        return PackedExperts(PackedWeight((s.at(order),), columns) for s in segments if s is not None)

    def unread(self, layers: int) -> list[str]:
        """Tensors that no weight used and that are not known to be irrelevant."""
        return [name for name in self.sources if name not in self.read and not self._ignorable(name, layers)]

    def parts(self, name: str) -> dict[str, Tensor]:
        """Tensors whose names begin with `name` and a dot."""
        return {key: self._take(key) for key in self.sources if key.startswith(f"{name}.")}

    def _find(self, name: str) -> str | None:
        bare = name.split(".", 1)[1] if "." in name else name  # backbones are published without their leading "model."
        names = [name, bare]
        if self.tower is not None:
            names += [self.tower + name.removeprefix("model."), f"language_model.{name}"]
        return next((key for key in names if key in self.sources), None)

    def _take(self, name: str) -> Tensor:
        if name not in self.sources:
            raise InputError(f"{self.path} has no tensor {name!r}, which its neighbor needs")
        self.read.add(name)
        source = self.sources[name]
        return source if isinstance(source, Tensor) else source.get_tensor(name)

    def _ignorable(self, name: str, layers: int) -> bool:
        """Buffers of older files, MTP layers, activation scales, and the towers of multimodal models."""
        if name.endswith((".attn.bias", "attn.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")):
            return True
        if name.endswith(("input_scale", "k_scale", "v_scale", "activation_scale", "weight_format")):  # of activations
            return True
        if name.startswith(OTHER_TOWERS) or (self.tower is not None and not name.startswith(self.tower)):
            return True
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        return name.startswith("mtp.") or bool(layer and int(layer[1]) >= layers)


def fp8(tensor: Tensor, scale: Tensor, name: str, block: tuple[int, int] = (128, 128)) -> Tensor:
    """Dequantize FP8 with one scale, one a row, or one a block; scales in bytes are exponents (E8M0)."""
    scale = fp8_scale(tensor, scale, name, block)
    if scale.ndim and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(min(block[1], tensor.shape[-1]), -1)[..., : tensor.shape[-1]]
    return (tensor.float() * scale).bfloat16()


def fp8_scale(tensor: Tensor, scale: Tensor, name: str, block: tuple[int, int]) -> Tensor:
    """Expand FP8 scales to float32: one in all, one a row, or one for each row and block of columns."""
    scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    if scale.numel() != 1 and scale.shape != (*tensor.shape[:-1], 1):
        *_, rows, columns = 1, 1, *tensor.shape
        blocks = *tensor.shape[:-2], -(-rows // block[0]), -(-columns // block[1])
        if tuple(scale.shape) != blocks or tensor.ndim < 2:
            raise InputError(
                f"tensor {name} has scales of shape {tuple(scale.shape)}, its blocks of {block[0]} × {block[1]} "
                f"are {blocks}"
            )
        scale = scale.repeat_interleave(min(block[0], rows), -2)[..., :rows, :]
    return scale


def fp8_rows(tensor: Tensor, scale: Tensor, name: str, block: tuple[int, int]) -> Segment | None:
    """Keep an FP8 matrix packed, scales rounded within 2⁻¹¹; None where blocks or scales do not fit our groups."""
    if tensor.ndim != 2 or not tensor.numel() or not float8_finite(tensor):
        return None
    (rows, columns), scale = tensor.shape, fp8_scale(tensor, scale, name, block)
    scale = scale.view(1, 1) if scale.numel() == 1 else scale
    width = block[1] if scale.shape[1] > 1 else columns
    group = next((n for n in (64, 32, 16) if gcd(width, columns) % n == 0), 0)
    if not group:
        return None
    scale_NG = scale.repeat_interleave(min(width, columns) // group, 1)[:, : columns // group].expand(rows, -1)
    units = row_units(scale_NG)
    halves = (scale_NG / units[:, None]).half()
    if not torch.allclose(halves * units[:, None], scale_NG, rtol=2**-11, atol=0):
        return None
    codes = tensor.contiguous().view(torch.uint8)
    return Segment(Layout(8, group, rotate=False, float8=True), codes, halves, None, units)


def fp8_block(said: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an FP8 scale block, by quantization_config; (128, 128) by default."""
    given = [said.get("weight_block_size"), *(weights.get("block_structure") for weights in groups_of(said))]
    found: Any = next((block for block in given if block is not None), (128, 128))
    if isinstance(found, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", found):  # format of older compressed-tensors
        found = [int(side) for side in found.split("x")]
    if not isinstance(found, (list, tuple)) or len(found) != 2 or any(type(n) is not int or n < 1 for n in found):
        raise InputError(f"quantization_config: a block of FP8 is two numbers of at least 1, got {found!r}")
    return found[0], found[1]


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Dequantize MXFP4 experts (E, rows, columns / 32, 16 bytes) to bfloat16 (E, columns, rows), as published."""
    low, high = blocks & 15, blocks >> 4
    numbers = FP4[torch.stack([low, high], -1).flatten(-2).int()]
    numbers = torch.ldexp(numbers, (scales.int() - 127).unsqueeze(-1))
    return numbers.bfloat16().flatten(-2).mT


def mxfp4_rows(blocks: Tensor, scales: Tensor) -> Segment | None:
    """Keep MXFP4 blocks (rows, columns / 32, 16 bytes) packed; None where float16 cannot hold their scales."""
    powers = scales.int() - 128  # minus 1, as the table E2M1 is doubled
    largest = powers.amax(1)
    relative = powers - largest[:, None] + 14
    if int(relative.min()) < -24 or int(scales.max()) == 255:
        return None
    halves, units = (torch.ones(()).expand_as(x).ldexp(x) for x in (relative, largest - 14))
    return Segment(Layout(4, 32, False, E2M1, rotate=False), blocks.flatten(1), halves.half(), None, units)


@contextmanager
def open_weights(directory: Path, quantization: Mapping[str, Any] | None = None) -> Iterator[Weights]:
    """Open the weights of a model directory: one safetensors file, shards with an index, or a pickled state dict."""
    method = (quantization or {}).get("quant_method")
    if method is not None and method not in UNPACKED:
        raise InputError(
            f"{directory}: weights packed by {method!r} are not supported ({', '.join(UNPACKED[:-1])} are)"
        )
    index, single, pickled = (
        directory / name for name in ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
    )
    with ExitStack() as stack:
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict):
                raise InputError(f"{index} has no field 'weight_map'")
            files = {name: _open(directory / name, stack) for name in sorted(set(places.values()))}
            yield Weights({tensor: files[name] for tensor, name in places.items()}, index, quantization)
        elif single.exists():
            file = _open(single, stack)
            yield Weights(dict.fromkeys(file.keys(), file), single, quantization)
        elif pickled.exists():
            try:
                state = torch.load(pickled, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise InputError(f"{pickled} is not a readable state dictionary: {first_line(error)}") from error
            yield Weights(dict(state), pickled)
        else:
            raise InputError(f"{directory} has no weights: neither {single.name}, {index.name} nor {pickled.name}")


def _open(path: Path, stack: ExitStack) -> Any:
    if not path.exists():
        raise InputError(f"{path} is missing, though the index names it")
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or cut short: {first_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
