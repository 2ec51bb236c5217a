"""Readers of quantized checkpoints: AWQ, GPTQ, compressed-tensors, MLX, bitsandbytes.

All but the last keep w = (q - z) · s with a scale s and a zero point z a group of input columns; they differ in which
side of a matrix lies in 32-bit words, and in what order (`-` is a nibble or byte of a word):

    AWQ                 qweight (in, out/-) and qzeros (in/g, out/-) in the order 0 2 4 6 1 3 5 7, scales (in/g, out)
    GPTQ                qweight (in/-, out), qzeros (in/g, out/-) holding z - 1 (z in version 2), scales (in/g, out)
    compressed-tensors  weight_packed (out, in/-), weight_zero_point (out/-, in/g), weight_scale (out, in/g); or int8
    MLX                 weight (out, in/-), scales (out, in/g), biases (out, in/g) holding -z · s
    bitsandbytes        8 bits: int8 with a scale a row. 4 bits: a code of sixteen numbers, dequantized

A group of 128 is written out as two of 64. Without zero points the weights are the file's in every bit; -z · s is
rounded to half precision. Columns in order of activation (`desc_act`, `actorder`) name their groups in `g_idx`, and
have none side by side: dequantized.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .packed_weight import Layout, Segment, nibbles, row_units

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
METHODS = ("awq", "gptq", "compressed-tensors", "bitsandbytes", "mlx")
FORMATS = "pack-quantized", "int-quantized", "float-quantized"  # of compressed-tensors
VECTORS = "g_idx", "weight_g_idx", "weight_shape", "SCB", "absmax", "nested_absmax", "quant_map", "nested_quant_map"
BNB_STATES = "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"


def read_integers(
    name: str, has: Callable[[str], bool], read: Callable[[str], Tensor], said: Mapping[str, Any]
) -> Segment | Tensor | None:
    """Read a quantized matrix: packed, or dequantized if its columns are unordered; None where it is not quantized."""
    base, method = name.removesuffix(".weight"), said.get("quant_method")

    def take(part: str) -> Tensor:
        tensor, vector = read(part), part.rpartition(".")[2] in (*VECTORS, *(x.rpartition(".")[2] for x in BNB_STATES))
        if tensor.ndim != (1 if vector else 2) or not tensor.numel():
            kind = "vector" if vector else "matrix"
            raise InputError(f"{part} has shape {tuple(tensor.shape)}; it must be a {kind} that is not empty")
        return tensor

    try:
        if method in ("awq", "gptq") and has(f"{base}.qweight"):
            return (_awq if method == "awq" else _gptq)(base, has, take, said)
        if method == "compressed-tensors" and has(f"{base}.weight_packed"):
            return _compressed(base, has, take, said)
        if method == "compressed-tensors" and has(f"{base}.weight_scale") and take(name).dtype == torch.int8:
            scale = take(f"{base}.weight_scale").float().view(len(take(name)), -1)
            return _segment(base, take(name).int() + 128, scale, None, 8)
        if method == "mlx" and has(f"{base}.scales"):
            return _mlx(base, take, said)
        if method == "bitsandbytes" and has(f"{base}.SCB"):
            return _segment(base, take(name).int() + 128, take(f"{base}.SCB").float().view(-1, 1) / 127, None, 8)
        if method == "bitsandbytes" and has(f"{name}.absmax"):
            return _bitsandbytes(name, has, take)
    except RuntimeError as error:  # mismatching shapes
        raise InputError(f"{base}: its packed tensors do not fit each other: {str(error).splitlines()[0]}") from None
    return None


def _awq(base, has, take, said) -> Segment:
    bits = _number(said, "bits", (4,))
    if str(said.get("version", "gemm")).lower() != "gemm":
        raise InputError(f"quantization_config: version {said['version']!r} of AWQ is not read; gemm is")
    order = torch.tensor(AWQ_ORDER).argsort()
    codes_CN, zeros_GN = (
        _fields(take(f"{base}.{part}"), bits)[..., order].flatten(1) for part in ("qweight", "qzeros")
    )
    scale_NG = take(f"{base}.scales").float().T
    return _segment(base, codes_CN.T, scale_NG, _minima(base, zeros_GN.T, scale_NG, bits), bits)


def _gptq(base, has, take, said) -> Segment | Tensor:
    bits = _number(said, "bits", (4, 8))
    codes_NC = _fields(take(f"{base}.qweight").T, bits).flatten(1)
    zeros_GN = _fields(take(f"{base}.qzeros"), bits).flatten(1)
    zeros_GN = zeros_GN if said.get("checkpoint_format") == "gptq_v2" else zeros_GN + 1 & (1 << bits) - 1
    scale_NG = take(f"{base}.scales").float().T
    if has(f"{base}.g_idx"):
        ordered = _ordered(f"{base}.g_idx", take, codes_NC, zeros_GN.T, scale_NG)
        if ordered is not None:
            return ordered
    return _segment(base, codes_NC, scale_NG, _minima(base, zeros_GN.T, scale_NG, bits), bits)


def _ordered(name: str, take, codes_NC: Tensor, zeros_NG: Tensor, scale_NG: Tensor) -> Tensor | None:
    """Dequantize weights with a group index a column (act-order, `g_idx`); None where groups are contiguous."""
    index, columns, groups = take(name).long(), codes_NC.shape[1], scale_NG.shape[1]
    if len(index) != columns or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < groups):
        raise InputError(f"{name} does not name one of {groups} groups for each of {columns} columns")
    if torch.equal(index, torch.arange(columns) // (columns // groups)):
        return None
    return (codes_NC - zeros_NG[:, index]).float() * scale_NG[:, index]


def _compressed(base, has, take, said) -> Segment | Tensor:
    if said.get("format", "pack-quantized") not in ("pack-quantized", "mixed-precision"):
        raise InputError(f"quantization_config: format {said['format']!r} is not read; {' and '.join(FORMATS)} are")
    bits = _number(next(iter(groups_of(said)), {}), "num_bits", (4, 8))
    codes_NC = _fields(take(f"{base}.weight_packed"), bits).flatten(1)
    if has(f"{base}.weight_shape"):
        said_shape = take(f"{base}.weight_shape").tolist()
        rows, columns = codes_NC.shape
        whole = len(said_shape) == 2 and all(type(size) is int for size in said_shape)
        if not whole or said_shape[0] != rows or said_shape[1] not in range(1, columns + 1):
            raise InputError(f"{base}.weight_shape is {said_shape}, weight_packed holds {rows} × {columns}")
        codes_NC = codes_NC[:, : said_shape[1]]
    scale_NG = take(f"{base}.weight_scale").float()
    zeros_NG = torch.full(scale_NG.shape, 1 << bits - 1)
    if has(f"{base}.weight_zero_point"):  # whole words: those of the last rows are filled up
        zeros_NG = _fields(take(f"{base}.weight_zero_point").T, bits).flatten(1).T[: len(scale_NG)]
    if has(f"{base}.weight_g_idx"):
        ordered = _ordered(f"{base}.weight_g_idx", take, codes_NC, zeros_NG, scale_NG)
        if ordered is not None:
            return ordered
    return _segment(base, codes_NC, scale_NG, _minima(base, zeros_NG, scale_NG, bits), bits)


def groups_of(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Weight settings of compressed-tensors' `config_groups`."""
    groups = said.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise InputError(f"quantization_config: config_groups must hold an object for each group, got {groups!r}")
    found: list[Mapping[str, Any]] = [group.get("weights") or {} for group in groups.values()]
    if strange := [weights for weights in found if not isinstance(weights, Mapping)]:
        raise InputError(f"quantization_config: weights of config_groups must be an object, got {strange[0]!r}")
    return found


def _mlx(base, take, said) -> Segment:
    said = {**said, **own} if isinstance(own := said.get(base), Mapping) else said  # a layer may have its own bits
    if said.get("mode", "affine") != "affine":
        raise InputError(f"quantization: mode {said['mode']!r} of MLX is not read; affine is")
    bits = _number(said, "bits", (4, 8))
    words = take(f"{base}.weight")
    codes_NC = _fields(words.view(torch.int32) if words.dtype == torch.uint32 else words, bits).flatten(1)
    return _segment(base, codes_NC, take(f"{base}.scales").float(), take(f"{base}.biases").float(), bits)


def _bitsandbytes(name, has, take) -> Tensor:
    """Dequantize a bitsandbytes 4-bit matrix (NF4, FP4), with nested (double) quantization of scales."""
    state = next((f"{name}.{state}" for state in BNB_STATES if has(f"{name}.{state}")), None)
    if state is None:
        raise InputError(f"{name} is packed by bitsandbytes in 4 bits and has none of {', '.join(BNB_STATES)}")
    try:
        about = json.loads(bytes(take(state).tolist()))
        shape, size = [int(n) for n in about["shape"]], int(about["blocksize"])
        offset, nested = float(about.get("nested_offset", 0)), int(about.get("nested_blocksize", 1))
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[about["dtype"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{state} is not what bitsandbytes writes: {error!r}") from None
    scales, codes = take(f"{name}.absmax"), take(name).flatten()
    if has(f"{name}.nested_absmax"):
        outer, inner = take(f"{name}.nested_absmax").repeat_interleave(nested), take(f"{name}.nested_quant_map")
        if scales.dtype != torch.uint8 or len(inner) != 256:
            kind = str(scales.dtype).removeprefix("torch.")
            raise InputError(f"{name}.absmax is {kind} for {len(inner)} numbers; nested scales are bytes for 256")
        scales = inner[scales.int()] * outer[: len(scales)] + offset
    if min(size, *shape) < 1 or math.prod(shape) != 2 * len(codes) or len(scales) != -(-2 * len(codes) // size):
        raise InputError(f"{name}: {len(codes)} bytes and {len(scales)} scales do not make {shape} in blocks of {size}")
    table = take(f"{name}.quant_map").float()
    if len(table) != 16:
        raise InputError(f"{name}.quant_map has {len(table)} numbers; 4 bits have 16")
    numbers = table[torch.stack([codes >> 4, codes & 15], -1).flatten().int()]
    return (numbers * scales.repeat_interleave(size)[: len(numbers)]).to(dtype).view(shape)


def _minima(base: str, zeros_NG: Tensor, scale_NG: Tensor, bits: int) -> Tensor | None:
    """Minima of groups, from zero points; None where all zero points are in the middle (symmetric)."""
    if zeros_NG.shape != scale_NG.shape:
        raise InputError(f"{base}: zero points of shape {tuple(zeros_NG.shape)} for scales of {tuple(scale_NG.shape)}")
    return -zeros_NG * scale_NG if bool((zeros_NG != 1 << (bits - 1)).any()) else None


def _number(said: Mapping[str, Any], field: str, known: tuple[int, ...]) -> int:
    value = said.get(field)
    if value not in known or isinstance(value, bool):
        raise InputError(f"quantization_config: {field} is {value!r}; {' and '.join(map(str, known))} are read")
    return int(value)


def _fields(words: Tensor, bits: int) -> Tensor:
    """Unpack bit fields of 32-bit words, the lowest first: (…, n) to (…, n, 32 / bits)."""
    if words.dtype is not torch.int32:
        raise RuntimeError(f"words are {words.dtype}, not int32".replace("torch.", ""))
    return words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32) & ((1 << bits) - 1)


def _segment(base: str, codes_NC: Tensor, scale_NG: Tensor, minima_NG: Tensor | None, bits: int) -> Segment:
    rows, columns = codes_NC.shape
    groups = scale_NG.shape[1]
    if len(scale_NG) != rows or columns % groups or (minima_NG is not None and minima_NG.shape != scale_NG.shape):
        raise InputError(f"{base}: scales of shape {tuple(scale_NG.shape)} do not divide weights of {rows} × {columns}")
    size = columns // groups
    group = next((n for n in (64, 32, 16) if size % n == 0), 0)
    if not group:
        raise InputError(f"{base}: groups of {size} columns are not read; multiples of 16 are")
    if not scale_NG.isfinite().all() or (minima_NG is not None and not minima_NG.isfinite().all()):
        raise InputError(f"{base}: its scales hold NaN or infinity")
    units = row_units(scale_NG, minima_NG)
    if minima_NG is None and torch.equal(scale_NG.half().float(), scale_NG):  # as they are, the smallest too
        units = torch.ones(rows)

    def halved(part: Tensor) -> Tensor:
        return (part / units[:, None]).half().repeat_interleave(size // group, 1)

    codes = codes_NC.to(torch.uint8).contiguous()
    codes = nibbles(codes) if bits == 4 else codes
    minima = None if minima_NG is None else halved(minima_NG)
    return Segment(Layout(bits, group, minima is not None, (), rotate=False), codes, halved(scale_NG), minima, units)
