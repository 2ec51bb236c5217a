"""Round-to-nearest quantization of float weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.packed_linear import rotated
from .packed_weight import Layout, PackedWeight, Segment, nibbles


def nearest(weight: Tensor, layout: Layout) -> PackedWeight:
    """Round float rows to the nearest codes, groups scaled by min-max; the C++ packer searches better ranges."""
    columns = weight.shape[1]
    w_NC = weight.detach().float()
    w_NC = rotated(w_NC) if layout.rotate else F.pad(w_NC, (0, -columns % layout.group))
    w_NGC, half = w_NC.unflatten(-1, (-1, layout.group)), 1 << (layout.bits - 1)
    most = 2 * half - 1 if layout.minimum else 448 if layout.float8 else half - 1
    exponents = torch.frexp(w_NC.abs().amax(1) / most).exponent - 1
    units = torch.ldexp(torch.ones_like(w_NC[:, 0]), exponents.clamp(min=-120))
    low = w_NGC.amin(-1) if layout.minimum else -half * w_NGC.abs().amax(-1) / most
    size = w_NGC.amax(-1) - low if layout.minimum else w_NGC.abs().amax(-1)
    if layout.float8:
        codes, scales = float8_nearest(w_NGC, size / most / units[:, None], units)
        return PackedWeight((Segment(layout, codes, scales, None, units),), columns)
    scales = (size / most / units[:, None]).half()
    step = scales.float() * units[:, None]
    minima = (low / units[:, None]).half() if layout.minimum else None
    shift = -half * step if minima is None else minima.float() * units[:, None]
    inverse = torch.where(step > 0, 1 / step, 0)
    codes = ((w_NGC - shift[..., None]) * inverse[..., None]).round().clamp(0, 2 * half - 1).to(torch.uint8).flatten(1)
    codes = nibbles(codes) if layout.bits == 4 else codes
    return PackedWeight((Segment(layout, codes, scales, minima, units),), columns)


def float8_nearest(w_NGC: Tensor, least_NG: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 codes and scales: of eight candidates from the min-max scale to twice that, the least squared error.

    Float8 loses a share of a number, so the largest decide: SmolLM2 loses KL 0.021, by the least scale 0.033."""
    codes, scales = torch.empty_like(w_NGC, dtype=torch.uint8), torch.empty_like(least_NG, dtype=torch.float16)
    best_NG = torch.full_like(least_NG, torch.inf)
    for eighths in range(8, 16):
        tried = (least_NG * (eighths / 8)).half()
        step = (tried.float() * units[:, None])[..., None]
        numbers = torch.where(step > 0, w_NGC / step, 0).clamp(-448, 448).to(torch.float8_e4m3fn)
        lost_NG = (numbers.float() * step - w_NGC).square().sum(-1)
        better = lost_NG < best_NG
        codes[better], scales[better] = numbers.view(torch.uint8)[better], tried[better]
        best_NG = best_NG.minimum(lost_NG)
    return codes.flatten(1), scales
