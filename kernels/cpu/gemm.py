"""Matrix products for training on a CPU, in C++ (csrc/cpu/training/gemm.cpp), where they are faster than PyTorch's.

On a CPU of AMD they are: Intel's library takes no AVX-512 there (100 GFLOP/s of a Zen 5 core's 263 in float32; ours
200 to 250), and oneDNN multiplies bfloat16 at 440 of 527 (ours 480 to 500). Elsewhere `is_fast` says no.

N tokens, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def weight_gradient(left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """dW (O, I) of packed gradients of outputs and packed inputs, summed in float32, in the operands' format."""
    out = torch.empty(left.shape[1], right.shape[1], dtype=left.dtype)
    _native.multiply_tokens(left, right, tokens, out, False, torch.get_num_threads())
    return out
