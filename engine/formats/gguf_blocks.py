"""Block formats of GGUF, as numbers in float32: of N blocks (N, bytes), the numbers (N, count), bit for bit as ggml's.

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


def _half(x: Bytes) -> Floats:
    return np.ascontiguousarray(x).view("<f2").astype(np.float32)


def _parts(x: Bytes, run: int, bits: int) -> Bytes:
    """Fields of so many bits: of each run of bytes the lowest, then the next, as (N, numbers)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (x.reshape(len(x), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)).reshape(len(x), -1)


def _five(low: Bytes, high: Bytes) -> Floats:
    bits = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return (_parts(low, 16, 4) | bits << 4).astype(np.float32)


def _scales_and_minima(x: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of 6 bits in 12 bytes: four of each whole, the others from two places."""
    scale, minimum, rest = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = np.hstack([scale & 63, rest & 15 | scale >> 2 & 48])
    minima = np.hstack([minimum & 63, rest >> 4 | minimum >> 2 & 48])
    return scales.astype(np.float32), minima.astype(np.float32)


def _spread(scales: Floats, codes: Floats) -> Floats:
    """Codes times the scale of their group."""
    groups = scales.shape[1]
    return (scales[:, :, None] * codes.reshape(len(codes), groups, -1)).reshape(len(codes), -1)


def _k(x: Bytes, codes: Bytes) -> Floats:
    scales, minima = _scales_and_minima(x[:, 4:16])
    scales, minima = _half(x[:, :2]) * scales, _half(x[:, 2:4]) * minima
    return _spread(scales, codes.astype(np.float32)) - np.repeat(minima, 32, axis=1)


def _q5_k(x: Bytes) -> Floats:
    return _k(x, _parts(x[:, 48:], 32, 4) | _parts(x[:, 16:48], 32, 1) << 4)


def _q6_k(x: Bytes) -> Floats:
    codes = _parts(x[:, :128], 64, 4) | _parts(x[:, 128:192], 32, 2) << 4
    scales = _half(x[:, 208:]) * np.ascontiguousarray(x[:, 192:208]).view(np.int8).astype(np.float32)
    return _spread(scales, codes.astype(np.float32) - 32)


def _iq4_xs(x: Bytes) -> Floats:
    high = np.ascontiguousarray(x[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (_parts(x[:, 4:8], 1, 4) | high.astype(np.uint8) << 4).astype(np.float32) - 32
    return _spread(_half(x[:, :2]) * scales, IQ4[_parts(x[:, 8:], 16, 4)])


def _mxfp4(x: Bytes) -> Floats:
    scales = np.ldexp(np.float32(1), x[:, :1].astype(np.int32) - 128)
    return scales * E2M1[_parts(x[:, 1:], 16, 4)]


# Number of the type: its name, numbers a block, bytes a block, and what the bytes are.
TYPES: dict[int, tuple[str, int, int, Callable[[Bytes], Floats]]] = {
    0: ("F32", 1, 4, lambda x: np.ascontiguousarray(x).view("<f4")),
    1: ("F16", 1, 2, _half),
    2: ("Q4_0", 32, 18, lambda x: _half(x[:, :2]) * (_parts(x[:, 2:], 16, 4).astype(np.float32) - 8)),
    3: ("Q4_1", 32, 20, lambda x: _half(x[:, :2]) * _parts(x[:, 4:], 16, 4).astype(np.float32) + _half(x[:, 2:4])),
    6: ("Q5_0", 32, 22, lambda x: _half(x[:, :2]) * (_five(x[:, 6:], x[:, 2:6]) - 16)),
    7: ("Q5_1", 32, 24, lambda x: _half(x[:, :2]) * _five(x[:, 8:], x[:, 4:8]) + _half(x[:, 2:4])),
    8: ("Q8_0", 32, 34, lambda x: _half(x[:, :2]) * np.ascontiguousarray(x[:, 2:]).view(np.int8).astype(np.float32)),
    12: ("Q4_K", 256, 144, lambda x: _k(x, _parts(x[:, 16:], 32, 4))),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
    20: ("IQ4_NL", 32, 18, lambda x: _half(x[:, :2]) * IQ4[_parts(x[:, 2:], 16, 4)]),
    23: ("IQ4_XS", 256, 136, _iq4_xs),
    30: ("BF16", 1, 2, lambda x: (np.ascontiguousarray(x).view("<u2").astype(np.uint32) << 16).view(np.float32)),
    39: ("MXFP4", 32, 17, _mxfp4),
}
