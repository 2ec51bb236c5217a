"""GGUF blocks as packed weights without requantization: the same codes in another order.

Scales of simple formats are half precision already. K formats multiply two to get one, which is rounded to half
precision (within 2⁻¹¹); a power of two a row keeps it away from the smallest numbers of that format. Five and six bits
lie in bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .gguf_blocks import (
    E2M1,
    IQ4,
    TYPES,
    Bytes,
    Floats,
    five,
    half,
    iq4_xs_scales,
    k_scales,
    mxfp4_scales,
    q5_k_codes,
    q6_k_codes,
    q6_k_scales,
)
from .packed_weight import Layout, Segment, row_units

Codes = tuple[Bytes, Floats, Floats | None]  # of N blocks: (N, count · bits / 8) codes, (N, groups) scales and minima


def _signed(x: Bytes) -> Bytes:
    return x ^ np.uint8(128)


def pairs(x: Bytes, run: int) -> Bytes:
    """Reorder 4-bit codes: neighbors share a byte, where ggml pairs codes half a run apart."""
    x = x.reshape(len(x), -1, run)
    even, odd = x[..., ::2], x[..., 1::2]
    return np.concatenate([even & 15 | odd << 4, even >> 4 | odd & 240], axis=-1).reshape(len(x), -1)


def _k(x: Bytes, codes: Bytes) -> Codes:
    scales, minima = k_scales(x)
    return codes, scales, -minima


_IQ4, _E2M1 = tuple(int(value) for value in IQ4), tuple(int(value) for value in E2M1)
# GGUF type → bits, group size, minima or not, code table, and the function that unpacks its blocks.
PACKED: dict[int, tuple[int, int, bool, tuple[int, ...], Callable[[Bytes], Codes]]] = {
    2: (4, 32, False, (), lambda x: (pairs(x[:, 2:], 16), half(x[:, :2]), None)),
    3: (4, 32, True, (), lambda x: (pairs(x[:, 4:], 16), half(x[:, :2]), half(x[:, 2:4]))),
    6: (8, 32, False, (), lambda x: (five(x[:, 6:], x[:, 2:6]) + np.uint8(128 - 16), half(x[:, :2]), None)),
    7: (8, 32, True, (), lambda x: (five(x[:, 8:], x[:, 4:8]), half(x[:, :2]), half(x[:, 2:4]))),
    8: (8, 32, False, (), lambda x: (_signed(x[:, 2:]), half(x[:, :2]), None)),
    12: (4, 32, True, (), lambda x: _k(x, pairs(x[:, 16:], 32))),
    13: (8, 32, True, (), lambda x: _k(x, q5_k_codes(x))),
    14: (8, 16, False, (), lambda x: (q6_k_codes(x) + np.uint8(128 - 32), q6_k_scales(x), None)),
    20: (4, 32, False, _IQ4, lambda x: (pairs(x[:, 2:], 16), half(x[:, :2]), None)),
    23: (4, 32, False, _IQ4, lambda x: (pairs(x[:, 8:], 16), iq4_xs_scales(x), None)),
    39: (4, 32, False, _E2M1, lambda x: (pairs(x[:, 1:], 16), mxfp4_scales(x), None)),
}
MADE = (12, 13, 14, 23, 39)  # types whose scales are computed; a power of two a row keeps them in float16's range


def pack_blocks(kind: int, blocks: Bytes, rows: int) -> Segment | None:
    """Repack rows of blocks (N, bytes) as a segment; None where float16 cannot hold MXFP4's powers of two."""
    bits, group, minimum, table, read = PACKED[kind]
    _, count, size, _ = TYPES[kind]
    columns = len(blocks) // rows * count
    layout = Layout(bits, group, minimum, table, rotate=False)
    codes = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    scales = np.empty((rows, columns // group), np.float32)
    minima = np.empty_like(scales) if minimum else None
    step = max(1, (1 << 16) // (len(blocks) // rows * size))  # rows that fit the cache
    for at in range(0, rows, step):
        some = blocks[at * columns // count : (at + step) * columns // count]
        numbers, scale, least = read(some)
        codes.numpy()[at : at + step] = numbers.reshape(-1, columns * bits // 8)
        scales[at : at + step] = scale.reshape(-1, columns // group)
        if minima is not None and least is not None:
            minima[at : at + step] = least.reshape(-1, columns // group)
    scale_NG, least_NG = torch.from_numpy(scales), None if minima is None else torch.from_numpy(minima)
    units = row_units(scale_NG, least_NG) if kind in MADE else torch.ones(rows)
    halves = (scale_NG / units[:, None]).half()
    if kind == 39 and not torch.allclose(halves * units[:, None], scale_NG, rtol=0, atol=0, equal_nan=True):
        return None
    return Segment(layout, codes, halves, None if least_NG is None else (least_NG / units[:, None]).half(), units)
