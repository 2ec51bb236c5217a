"""RMSNorm: divide a row by its root mean square, then scale each column by a learned weight.

y = x / sqrt(mean(x²) + eps) · weight. Unlike LayerNorm there is no mean to subtract and no bias to add, so a row needs
one reduction. Eager PyTorch walks the row about five times; fused, it is read once and written once. `add_rms_norm`
also takes the residual addition that always precedes the norm in a pre-norm block: two reads and two writes, not seven
passes.

The backward needs only x, the weight and one number a row, 1/rms. With x̂ = x / rms and g = dy · weight,
dx = (g − x̂ · mean(g · x̂)) / rms, and dweight is the sum over rows of dy · x̂.

N rows, D columns.
"""

import torch
import torch.nn.functional as F

from .lang import wide
from .op import Case, Op


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Rows of `x` (…, D) divided by their root mean square, times `weight` (D,); computed in float32."""
    x_wide = x.to(wide(x))
    inverse_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * inverse_rms * weight.to(x_wide.dtype)).to(x.dtype)


def _rms_norm_eager(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    if x.dtype != weight.dtype:
        return _rms_norm(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of `x` and `residual` (…, D), normalized as by `rms_norm`, and the sum itself: (normed, residual)."""
    residual = residual + x
    return _rms_norm(residual, weight, eps), residual


def _add_rms_norm_eager(x, residual, weight, eps=1e-6):
    residual = residual + x
    return _rms_norm_eager(residual, weight, eps), residual


rms_norm = Op(
    name="rms_norm",
    reference=_rms_norm,
    eager=_rms_norm_eager,
    cases=[
        Case("tail", lambda m: (m.normal(5, 100), m.normal(100))),
        Case("one row", lambda m: (m.normal(1, 64), m.normal(64))),
        Case("no rows", lambda m: (m.normal(0, 64), m.normal(64))),
        Case("padded rows", lambda m: (m.padded(2, 3, 48), m.normal(48))),
        Case("every other column", lambda m: (m.strided(3, 32), m.normal(32))),
        Case("expanded gradient", lambda m: (m.normal(4, 96), m.normal(96)), expanded=True),
        Case("large magnitude", lambda m: (m.normal(3, 128, scale=1e4), m.normal(128))),
        Case("8192x4096", lambda m: (m.normal(8192, 4096), m.normal(4096)), bench=True),
    ],
    traffic=lambda x, weight, eps=1e-6: (2 * x.nbytes, 3 * x.nbytes),
    flops=lambda x, weight, eps=1e-6: (4 * x.numel(), 8 * x.numel()),
)

add_rms_norm = Op(
    name="add_rms_norm",
    reference=_add_rms_norm,
    eager=_add_rms_norm_eager,
    cases=[
        Case("tail", lambda m: (m.normal(5, 100), m.normal(5, 100), m.normal(100))),
        Case("padded rows", lambda m: (m.padded(2, 3, 48), m.padded(2, 3, 48), m.normal(48))),
        Case("expanded gradient", lambda m: (m.normal(4, 96), m.normal(4, 96), m.normal(96)), expanded=True),
        Case("8192x4096", lambda m: (m.normal(8192, 4096), m.normal(8192, 4096), m.normal(4096)), bench=True),
    ],
    traffic=lambda x, residual, weight, eps=1e-6: (4 * x.nbytes, 4 * x.nbytes),
    flops=lambda x, residual, weight, eps=1e-6: (5 * x.numel(), 9 * x.numel()),
)
