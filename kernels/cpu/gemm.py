"""Matrix products for training on a CPU, in C++ (csrc/cpu/training/gemm.cpp), where they are faster than PyTorch's.

On a CPU of AMD they are: Intel's library takes no AVX-512 there (100 GFLOP/s of a Zen 5 core's 263 in float32; ours
200 to 250), and oneDNN multiplies bfloat16 at 440 of 527 (ours 480 to 500). Elsewhere `is_fast` says no.

N tokens, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import op
from . import pointwise
from .pointwise import _native

BLOCK = 256  # tokens: packed operands have room for whole blocks of them
GRAIN = {torch.float32: 16, torch.bfloat16: 32}  # terms: a vector of 32-bit words
_FAST = {
    torch.float32: pointwise.HAS_NATIVE and _native.outruns_library(),
    torch.bfloat16: pointwise.HAS_NATIVE and _native.has_fast_pairs(),
}


def is_fast(dtype: torch.dtype) -> bool:
    """Are products of this format better done here than by PyTorch?"""
    return _FAST.get(dtype, False)


def room(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for tokens that C++ packs as an operand of `weight_gradient`."""
    return torch.empty((tokens + BLOCK - 1) // BLOCK * BLOCK, columns, dtype=dtype)


def fits(x_NI: Tensor, weight_OI: Tensor) -> bool:
    """Can `Packed` take this weight for these tokens, and is it the faster way?"""
    dtype = x_NI.dtype
    whole = is_fast(dtype) and not any(n % GRAIN[dtype] for n in weight_OI.shape)
    return whole and op._backend != "triton" and pointwise.is_supported(x_NI, weight_OI)


class Packed:
    """A weight (O, I) laid out for products with rows (N, I) and with their gradients (N, O)."""

    def __init__(self, weight_OI: Tensor, both: bool = True) -> None:
        self.weight = weight_OI.contiguous()
        self.forth, self.back = (torch.empty_like(self.weight) if wanted else None for wanted in (True, both))
        _native.pack(self.weight, False, self.forth)
        if both:
            _native.pack(self.weight, True, self.back)

    def multiply(self, x_NI: Tensor) -> Tensor:
        """x · weightᵀ."""
        y_NO = torch.empty(len(x_NI), len(self.weight), dtype=x_NI.dtype)
        _native.multiply(x_NI.contiguous(), self.forth, y_NO)
        return y_NO

    def multiply_back(self, dy_NO: Tensor, dx_NI: Tensor) -> None:
        """dx = dy · weight."""
        _native.multiply(dy_NO, self.back, dx_NI)

    def add_gradient(self, sum_OI: Tensor, dy_NO: Tensor, x_NI: Tensor) -> None:
        """sum += dyᵀ · x, for a sum in float32."""
        left, right = (room(len(x), x.shape[1], x.dtype) for x in (dy_NO, x_NI))
        _native.pack_tokens(dy_NO, True, left), _native.pack_tokens(x_NI.contiguous(), False, right)
        _native.multiply_tokens(left, right, len(x_NI), sum_OI, True, torch.get_num_threads())


def weight_gradient(left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """dW (O, I) of packed gradients of outputs and packed inputs, summed in float32, in the operands' format."""
    out = torch.empty(left.shape[1], right.shape[1], dtype=left.dtype)
    _native.multiply_tokens(left, right, tokens, out, False, torch.get_num_threads())
    return out
