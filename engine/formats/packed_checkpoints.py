"""Integer weights of AWQ, GPTQ and compressed-tensors as packed rows.

All keep w = (q - z) · s with a scale s and a zero point z a group of input columns; they differ in which side of a
matrix lies in 32-bit words, and in what order (`-` is a nibble or byte of a word):

    AWQ                 qweight (in, out/-) and qzeros (in/g, out/-) in the order 0 2 4 6 1 3 5 7, scales (in/g, out)
    GPTQ                qweight (in/-, out), qzeros (in/g, out/-) holding z - 1 (z in version 2), scales (in/g, out)
    compressed-tensors  weight_packed (out, in/-), weight_zero_point (out/-, in/g), weight_scale (out, in/g); or int8

A group of 128 is written out as two of 64. Without zero points the weights are the file's in every bit; -z · s is
rounded to half precision. GPTQ's columns in order of activation (`desc_act`) have no groups side by side: dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .packed_weight import Layout, Segment

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
METHODS = ("awq", "gptq", "compressed-tensors")


def read_integers(
    name: str, has: Callable[[str], bool], take: Callable[[str], Tensor], said: Mapping[str, Any]
) -> Segment | Tensor | None:
    """A matrix of a checkpoint as it is packed; a tensor where its columns are in no order; None where it is plain."""
    base, method = name.removesuffix(".weight"), said.get("quant_method")
    try:
        if method in ("awq", "gptq") and has(f"{base}.qweight"):
            return (_awq if method == "awq" else _gptq)(base, has, take, said)
        if method == "compressed-tensors" and has(f"{base}.weight_packed"):
            return _compressed(base, has, take, said)
        if method == "compressed-tensors" and has(f"{base}.weight_scale") and take(name).dtype == torch.int8:
            scale = take(f"{base}.weight_scale").float().view(len(take(name)), -1)
            return _segment(base, (take(name).int() + 128).to(torch.uint8), scale, None, 8)
    except RuntimeError as error:  # of tensors whose shapes do not go together
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
    return _segment(base, codes_CN.T, take(f"{base}.scales").float().T, zeros_GN.T, bits)


def _gptq(base, has, take, said) -> Segment | Tensor:
    bits = _number(said, "bits", (4, 8))
    codes_NC = _fields(take(f"{base}.qweight").T, bits).flatten(1)
    zeros_GN = _fields(take(f"{base}.qzeros"), bits).flatten(1)
    zeros_GN = zeros_GN if said.get("checkpoint_format") == "gptq_v2" else zeros_GN + 1
    scale_GN, columns = take(f"{base}.scales").float(), codes_NC.shape[1]
    if has(f"{base}.g_idx"):
        index = take(f"{base}.g_idx").long()
        if len(index) != columns or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(scale_GN)):
            raise InputError(f"{base}.g_idx does not name one of {len(scale_GN)} groups for each of {columns} columns")
        if not torch.equal(index, torch.arange(columns) // (columns // len(scale_GN))):
            return (codes_NC - zeros_GN.T[:, index]).float() * scale_GN.T[:, index]
    return _segment(base, codes_NC, scale_GN.T, zeros_GN.T, bits)


def _compressed(base, has, take, said) -> Segment:
    groups = [group for group in (said.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    bits = _number((groups[0].get("weights") or {}) if groups else {}, "num_bits", (4, 8))
    codes_NC = _fields(take(f"{base}.weight_packed"), bits).flatten(1)
    zeros_NG = None
    if has(f"{base}.weight_zero_point"):
        zeros_NG = _fields(take(f"{base}.weight_zero_point").T, bits).flatten(1).T
    if has(f"{base}.weight_shape"):
        rows, columns = take(f"{base}.weight_shape").tolist()
        if len(codes_NC) != rows or not 0 < columns <= codes_NC.shape[1]:
            raise InputError(f"{base}.weight_shape is {rows} × {columns}, weight_packed holds {tuple(codes_NC.shape)}")
        codes_NC = codes_NC[:, :columns]
    return _segment(base, codes_NC, take(f"{base}.weight_scale").float(), zeros_NG, bits)


def _number(said: Mapping[str, Any], field: str, known: tuple[int, ...]) -> int:
    value = said.get(field)
    if value not in known or isinstance(value, bool):
        raise InputError(f"quantization_config: {field} is {value!r}; {' and '.join(map(str, known))} are read")
    return int(value)


def _fields(words: Tensor, bits: int) -> Tensor:
    """The numbers in 32-bit words, the lowest bits first: (…, n) to (…, n, 32 / bits)."""
    return words.int().unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32) & ((1 << bits) - 1)


def _segment(base: str, codes_NC: Tensor, scale_NG: Tensor, zeros_NG: Tensor | None, bits: int) -> Segment:
    rows, columns = codes_NC.shape
    groups = scale_NG.shape[1]
    if len(scale_NG) != rows or columns % groups or (zeros_NG is not None and zeros_NG.shape != scale_NG.shape):
        raise InputError(f"{base}: scales of shape {tuple(scale_NG.shape)} do not divide weights of {rows} × {columns}")
    size = columns // groups
    group = next((n for n in (64, 32, 16) if size % n == 0), 0)
    if not group:
        raise InputError(f"{base}: groups of {size} columns are not read; multiples of 16 are")
    if not scale_NG.isfinite().all():
        raise InputError(f"{base}: its scales hold NaN or infinity")
    half = 1 << (bits - 1)
    minimum = zeros_NG is not None and bool((zeros_NG != half).any())
    minima_NG = -zeros_NG * scale_NG if minimum and zeros_NG is not None else None
    largest = scale_NG.abs().amax(1) if minima_NG is None else torch.maximum(scale_NG.abs(), minima_NG.abs()).amax(1)
    units = torch.ldexp(torch.ones(rows), torch.frexp(largest).exponent - 15)

    def halved(part: Tensor) -> Tensor:
        return (part / units[:, None]).half().repeat_interleave(size // group, 1)

    codes = codes_NC.to(torch.uint8).contiguous()
    codes = codes[:, ::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    minima = None if minima_NG is None else halved(minima_NG)
    return Segment(Layout(bits, group, minimum, (), rotate=False), codes, halved(scale_NG), minima, units)
