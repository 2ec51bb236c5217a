"""Dequantization of GGUF block formats: N blocks (N, bytes) to float32 (N, count), bit for bit as ggml does it.

A block has a scale d (float16), with a minimum m in formats that end in 1. In K formats 256 numbers share d, and each
16 or 32 of them have a scale of their own in 6 or 8 bits. Four bits lie in the low halves of a run of bytes and then in
the high ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)  # twice the numbers
Bytes = np.ndarray
Floats = np.ndarray


def half(x: Bytes) -> Floats:
    return np.ascontiguousarray(x).view("<f2").astype(np.float32)


def parts(x: Bytes, run: int, bits: int) -> Bytes:
    """Unpack bit fields: of each run of bytes the lowest field, then the next, as (N, numbers)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (x.reshape(len(x), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)).reshape(len(x), -1)


def five(low: Bytes, high: Bytes) -> Bytes:
    """Unpack 5-bit codes, whose fifth bits are stored apart."""
    bits = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return parts(low, 16, 4) | bits << 4


def _scales_and_minima(x: Bytes) -> tuple[Floats, Floats]:
    """Unpack eight 6-bit scales and eight minima from 12 bytes (the K formats' bit layout)."""
    scale, minimum, rest = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = np.hstack([scale & 63, rest & 15 | scale >> 2 & 48])
    minima = np.hstack([minimum & 63, rest >> 4 | minimum >> 2 & 48])
    return scales.astype(np.float32), minima.astype(np.float32)


def _spread(scales: Floats, codes: Floats) -> Floats:
    """Multiply codes by the scale of their group."""
    groups = scales.shape[1]
    return (scales[:, :, None] * codes.reshape(len(codes), groups, -1)).reshape(len(codes), -1)


def k_scales(x: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of the groups of a Q4_K or Q5_K block; minima are subtracted."""
    scales, minima = _scales_and_minima(x[:, 4:16])
    return half(x[:, :2]) * scales, half(x[:, 2:4]) * minima


def _k(x: Bytes, codes: Bytes) -> Floats:
    scales, minima = k_scales(x)
    return _spread(scales, codes.astype(np.float32)) - np.repeat(minima, 32, axis=1)


def q5_k_codes(x: Bytes) -> Bytes:
    return parts(x[:, 48:], 32, 4) | parts(x[:, 16:48], 32, 1) << 4


def q6_k_codes(x: Bytes) -> Bytes:
    return parts(x[:, :128], 64, 4) | parts(x[:, 128:192], 32, 2) << 4


def q6_k_scales(x: Bytes) -> Floats:
    return half(x[:, 208:]) * np.ascontiguousarray(x[:, 192:208]).view(np.int8).astype(np.float32)


def iq4_xs_scales(x: Bytes) -> Floats:
    high = np.ascontiguousarray(x[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (parts(x[:, 4:8], 1, 4) | high.astype(np.uint8) << 4).astype(np.float32) - 32
    return half(x[:, :2]) * scales


def mxfp4_scales(x: Bytes) -> Floats:
    return np.ldexp(np.float32(1), x[:, :1].astype(np.int32) - 128)


# Number of the type: its name, numbers a block, bytes a block, and what the bytes are.
TYPES: dict[int, tuple[str, int, int, Callable[[Bytes], Floats]]] = {
    0: ("F32", 1, 4, lambda x: np.ascontiguousarray(x).view("<f4")),
    1: ("F16", 1, 2, half),
    2: ("Q4_0", 32, 18, lambda x: half(x[:, :2]) * (parts(x[:, 2:], 16, 4).astype(np.float32) - 8)),
    3: ("Q4_1", 32, 20, lambda x: half(x[:, :2]) * parts(x[:, 4:], 16, 4).astype(np.float32) + half(x[:, 2:4])),
    6: ("Q5_0", 32, 22, lambda x: half(x[:, :2]) * (five(x[:, 6:], x[:, 2:6]).astype(np.float32) - 16)),
    7: ("Q5_1", 32, 24, lambda x: half(x[:, :2]) * five(x[:, 8:], x[:, 4:8]).astype(np.float32) + half(x[:, 2:4])),
    8: ("Q8_0", 32, 34, lambda x: half(x[:, :2]) * np.ascontiguousarray(x[:, 2:]).view(np.int8).astype(np.float32)),
    12: ("Q4_K", 256, 144, lambda x: _k(x, parts(x[:, 16:], 32, 4))),
    13: ("Q5_K", 256, 176, lambda x: _k(x, q5_k_codes(x))),
    14: ("Q6_K", 256, 210, lambda x: _spread(q6_k_scales(x), q6_k_codes(x).astype(np.float32) - 32)),
    20: ("IQ4_NL", 32, 18, lambda x: half(x[:, :2]) * IQ4[parts(x[:, 2:], 16, 4)]),
    23: ("IQ4_XS", 256, 136, lambda x: _spread(iq4_xs_scales(x), IQ4[parts(x[:, 8:], 16, 4)])),
    30: ("BF16", 1, 2, lambda x: (np.ascontiguousarray(x).view("<u2").astype(np.uint32) << 16).view(np.float32)),
    39: ("MXFP4", 32, 17, lambda x: mxfp4_scales(x) * E2M1[parts(x[:, 1:], 16, 4)]),
}
