"""Quantization to GGUF block formats: (N, count) in float32 to (N, bytes); gguf_blocks.py is the inverse.

Simple formats divide by the largest number of a block. Q4_K fits scale and minimum of 32 numbers by least squares from
a few ranges, and then rounds them to 6 bits; Q6_K has a scale of 8 bits for 16 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray
Bytes = np.ndarray
TRIES = 8


def q8_0(x: Floats) -> Bytes:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.hstack([_half(scale), _codes(x, scale, -127, 127).astype(np.int8).view(np.uint8)])


def q4_0(x: Floats) -> Bytes:
    scale = _extreme(x) / -8
    codes = (_codes(x, scale, -8, 7) + 8).astype(np.uint8)
    return np.hstack([_half(scale), _nibbles(codes, 16)])


def q5_0(x: Floats) -> Bytes:
    scale = _extreme(x) / -16
    codes = (_codes(x, scale, -16, 15) + 16).astype(np.uint8)
    return np.hstack([_half(scale), np.packbits(codes >> 4, axis=1, bitorder="little"), _nibbles(codes & 15, 16)])


def q4_k(x: Floats) -> Bytes:
    x_NGC = x.reshape(-1, 8, 32)
    scale_NG, minimum_NG = _ranges(x_NGC)
    d, least = (np.float16(y.max(axis=1, keepdims=True) / 63).astype(np.float32) for y in (scale_NG, minimum_NG))
    scales, minima = (_codes(y, unit, 0, 63).astype(np.uint8) for y, unit in ((scale_NG, d), (minimum_NG, least)))
    codes = _codes(x_NGC + (least * minima)[..., None], (d * scales)[..., None], 0, 15).astype(np.uint8)
    low, high = scales[:, :4] | (scales[:, 4:] >> 4 << 6), minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    packed = np.hstack([low, high, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4])
    return np.hstack([_half(d), _half(least), packed, _nibbles(codes.reshape(len(x), 256), 32)])


def q6_k(x: Floats) -> Bytes:
    x_NGC = x.reshape(-1, 16, 16)
    scale_NG = _extreme(x_NGC)[..., 0] / -32
    d = np.float16(_extreme(scale_NG) / -128).astype(np.float32)
    scales = _codes(scale_NG, d, -128, 127)
    codes = (_codes(x_NGC, (d * scales)[..., None], -32, 31) + 32).astype(np.uint8).reshape(len(x), 256)
    runs = (codes >> 4).reshape(len(x), 2, 4, 32)
    high = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
    return np.hstack(
        [_nibbles(codes & 15, 64), high.reshape(len(x), 64), scales.astype(np.int8).view(np.uint8), _half(d)]
    )


def _half(x: Any) -> Bytes:
    return x.astype("<f2").view(np.uint8)


def _extreme(x: Floats) -> Floats:
    """The number with the largest magnitude, sign kept, along the last dimension."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)


def _codes(x: Floats, scale: Any, low: int, high: int) -> Floats:
    """Round x / scale to integers within low … high; 0 where the scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(x * inverse), low, high)


def _nibbles(codes: Bytes, run: int) -> Bytes:
    """Pack two 4-bit codes a byte: one run in the low halves, the next run in the high halves."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _ranges(x_NGC: Floats) -> tuple[Floats, Floats]:
    """Least-squares search of the scale and minimum of each group, over its range and narrower ones."""
    low, high = np.minimum(x_NGC.min(-1), 0), np.maximum(x_NGC.max(-1), 0)
    best, found = np.full(low.shape, np.inf, np.float32), [np.zeros_like(low), np.zeros_like(low)]
    for part in np.linspace(1, 0.7, TRIES, dtype=np.float32):
        scale, minimum = (high - low) * part / 15, -low * part
        codes = _codes(x_NGC + minimum[..., None], scale[..., None], 0, 15)
        mean, mean_x = codes.mean(-1, keepdims=True), x_NGC.mean(-1, keepdims=True)
        spread = np.square(codes - mean).sum(-1)
        fitted = ((codes - mean) * (x_NGC - mean_x)).sum(-1) / np.maximum(spread, 1e-12)
        scale = np.where((spread > 0) & (fitted > 0), fitted, scale)
        minimum = np.maximum(scale * mean[..., 0] - mean_x[..., 0], 0)
        lost = np.square(_codes(x_NGC + minimum[..., None], scale[..., None], 0, 15) * scale[..., None]
                         - minimum[..., None] - x_NGC).sum(-1)  # fmt: skip
        better = lost < best
        best = np.where(better, lost, best)
        found = [np.where(better, new, old) for new, old in zip((scale, minimum), found)]
    return found[0], found[1]


QUANTIZERS = {"q8_0": q8_0, "q4_0": q4_0, "q5_0": q5_0, "q4_k": q4_k, "q6_k": q6_k}
