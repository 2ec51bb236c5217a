"""Keys and values in 8 bits, written and read in PyTorch: what csrc/cpu/serving/int8_pages.cpp does, where there is no
extension.

Decoding reads the keys and values of every token before it, so half the bytes are half the time and twice the tokens
in the same memory. Each token's key and value of a head becomes bytes of -127 … 127 and a scale, its largest number
over 127. The scale is its own: one a page would have to change with what comes later, and a request's numbers must
not depend on how its prompt was cut into chunks. Keys are rotated before, by a Walsh-Hadamard transform, which
spreads what is large in a few channels over all of them, and so are queries, which leaves their products alone
(QuaRot's idea: on a real model keys lose a quarter of what they lose without; values would gain a tenth of the little
they lose).

A page is a row of tiles, one for every sixteen tokens and head, laid out for the CPU's dot-product instruction, which
takes four neighboring bytes a lane:

    keys    (D / 4, 16 tokens, 4)   + 128, then 16 scales in float32
    values  (4, D, 4 tokens)               then 16 scales

with D padded to a multiple of sixteen. C++ multiplies the bytes as they are; here they are made floats again and handed
to `kernels.paged_attention`. Bytes and scales are the same; what attention gives differs by its rounding of queries and
weights to 16 bits.
"""

import torch
from torch import Tensor

from .... import kernels

TILE = 16  # tokens


def tile_bytes(head_size: int) -> int:
    """Bytes of a tile: sixteen keys, or values, of a head, and their scales."""
    return TILE * (_padded(head_size) + 4)


def write(x_TKD: Tensor, pages: Tensor, slots: Tensor, *, keys: bool) -> None:
    """Puts keys, or values, at `slots` of the pages (P, tiles, K, bytes); negative slots are skipped."""
    kept = (slots >= 0).nonzero().squeeze(-1)
    x_TKD = torch.nn.functional.pad(x_TKD[kept].float(), (0, _padded(x_TKD.shape[-1]) - x_TKD.shape[-1]))
    x_TKD = hadamard(x_TKD) if keys else x_TKD
    peak_TK = x_TKD.abs().amax(-1)
    inverse_TK = torch.where(peak_TK > 0, 127 / peak_TK, 0)
    bytes_TKD = (x_TKD * inverse_TK[..., None]).round().to(torch.int8)
    tile, lane = slots[kept] // TILE, slots[kept] % TILE
    numbers, scales = _parts(pages.flatten(0, 1), x_TKD.shape[-1])
    if keys:
        numbers = numbers.unflatten(-1, (-1, TILE, 4))
        numbers[tile, :, :, lane] = (bytes_TKD.view(torch.uint8) ^ 128).unflatten(-1, (-1, 4))
    else:
        numbers = numbers.unflatten(-1, (TILE // 4, -1, 4))
        numbers[tile, :, lane // 4, :, lane % 4] = bytes_TKD.view(torch.uint8)
    scales[tile, :, lane] = peak_TK / 127


def read(pages: Tensor, head_size: int, *, keys: bool) -> Tensor:
    """Dequantize pages: what pages (P, tiles, K, bytes) stand for: (P, page size, K, D) in float32."""
    numbers, scales = _parts(pages, _padded(head_size))
    if keys:
        numbers_PtKSD = (numbers ^ 128).unflatten(-1, (-1, TILE, 4)).transpose(-3, -2).flatten(-2)
    else:
        numbers_PtKSD = numbers.unflatten(-1, (TILE // 4, -1, 4)).transpose(-2, -1).flatten(-3, -2)
    x_PtKSD = numbers_PtKSD.contiguous().view(torch.int8) * scales[..., None]
    x_PtKSD = hadamard(x_PtKSD, back=True) if keys else x_PtKSD
    return x_PtKSD[..., :head_size].transpose(2, 3).flatten(1, 2)


def hadamard(x: Tensor, back: bool = False) -> Tensor:
    """The transform of csrc/cpu/serving/hadamard.hpp, in its order of additions; `back` undoes it, up to rounding.

    A width that is a multiple of sixteen is rotated in powers of two up to 256, the largest first, each times a power
    of two near 1 / √size.
    """
    parts = []
    while x.shape[-1]:
        size = min(256, 1 << x.shape[-1].bit_length() - 1)
        part, x = x[..., :size], x[..., size:]
        steps = [1 << i for i in range(size.bit_length() - 1)]
        for apart in [*(step for step in steps if step >= 16), 8, 4, 2, 1]:
            a, b = part.unflatten(-1, (-1, 2, apart)).unbind(-2)
            part = torch.stack([a + b, a - b], -2).flatten(-3)
        parts.append(part / 2 ** ((len(steps) + back) // 2))
    return torch.cat(parts, -1)


class Int8Attend:
    """`attend` over such pages in PyTorch."""

    def __init__(self, store, positions: Tensor, slots: Tensor, tables: Tensor, *lengths: Tensor):
        """`lengths` are the contexts, counts and starts of the sequences."""
        self.store, self.slots, self.lengths = store, slots, lengths[:2]
        self.used, self.tables = tables.unique(return_inverse=True)

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer) -> Tensor:
        sides = self.store.keys[layer.index], self.store.values[layer.index]
        for x_BTKD, pages, keys in zip((k_BTKD, v_BTKD), sides, (True, False)):
            write(x_BTKD[0], pages, self.slots, keys=keys)
        k_pages, v_pages = (
            read(pages[self.used], q_BTHD.shape[-1], keys=keys) for pages, keys in zip(sides, (True, False))
        )
        options = {"window": layer.window, "softcap": layer.softcap, "scale": layer.scale, "sinks": layer.sinks}
        seen = k_pages, v_pages, self.tables.int(), *self.lengths
        return kernels.paged_attention(q_BTHD[0].float(), *seen, **options)[None].to(q_BTHD.dtype)


def _padded(head_size: int) -> int:
    return -(-head_size // 16) * 16


def _parts(tiles: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The bytes of tiles (…, bytes), and their scales (…, 16)."""
    return tiles[..., : TILE * width], tiles[..., TILE * width :].view(torch.float32)
