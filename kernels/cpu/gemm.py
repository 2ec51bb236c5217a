"""GEMM for CPU training, in C++ (csrc/cpu/training/gemm.cpp), used where it is faster than PyTorch's.

On a CPU of AMD they are: Intel's library takes no AVX-512 there (100 GFLOP/s of a Zen 5 core's 263 in float32; ours
200 to 250), and oneDNN multiplies bfloat16 at 440 of 527 (ours 480 to 500, once a weight is packed). Elsewhere
`is_fast` says no.

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
    """Return whether our products of this dtype are faster than PyTorch's here."""
    return _FAST.get(dtype, False)


def room(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Allocate an operand of `weight_gradient` for tokens that C++ packs."""
    return torch.empty((tokens + BLOCK - 1) // BLOCK * BLOCK, columns, dtype=dtype)


def fits(x: Tensor, weight_OI: Tensor, *more: Tensor) -> bool:
    """Return whether our GEMM takes this weight and these tokens, and is faster for one product alone.

    In float32 only: in bfloat16 packing costs what oneDNN's product takes longer, unless it is done by the way.
    """
    return x.dtype == torch.float32 and takes(x, weight_OI, *more)


def takes(x: Tensor, weight_OI: Tensor, *more: Tensor) -> bool:
    """Return whether our GEMM takes this weight and these tokens, in a dtype in which it is fast."""
    whole = is_fast(x.dtype) and not any(n % GRAIN[x.dtype] for n in weight_OI.shape)
    return whole and op._backend != "triton" and pointwise.is_supported(x, weight_OI, *more)


class Packed:
    """Weight (O, I) packed for products with rows (N, I), forward, and with gradients (N, O), backward."""

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
        left, right = packed_tokens(dy_NO, True), packed_tokens(x_NI.contiguous(), False)
        _native.multiply_tokens(left, right, len(x_NI), sum_OI, True, torch.get_num_threads())


def packed_tokens(x_NI: Tensor, left: bool) -> Tensor:
    """Pack rows as an operand of `weight_gradient`."""
    packed = room(*x_NI.shape, x_NI.dtype)
    _native.pack_tokens(x_NI, left, packed)
    return packed


def weight_gradient(left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """dW (O, I) from packed output gradients and packed inputs, accumulated in float32, in their dtype."""
    out = torch.empty(left.shape[1], right.shape[1], dtype=left.dtype)
    _native.multiply_tokens(left, right, tokens, out, False, torch.get_num_threads())
    return out


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Differentiable linear layer, x (…, I) · weightᵀ + bias, for operands that `fits`."""
    return _Linear.apply(x, weight_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O):
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = Packed(weight_OI, both=False).multiply(x_NI)
        if bias_O is not None:
            y_NO += bias_O
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.shape = x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x_NI, weight_OI = ctx.saved_tensors
        dy_NO = dy.reshape(len(x_NI), -1).contiguous()
        to_x, to_weight, to_bias = ctx.needs_input_grad
        dx = dw = None
        if to_x:
            dx = torch.empty(ctx.shape, dtype=dy.dtype)
            back = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
            _native.pack(weight_OI.contiguous(), True, back)
            _native.multiply(dy_NO, back, dx.view(x_NI.shape))
        if to_weight:
            dw = weight_gradient(packed_tokens(dy_NO, True), packed_tokens(x_NI.contiguous(), False), len(x_NI))
        return dx, dw, dy_NO.sum(0) if to_bias else None
