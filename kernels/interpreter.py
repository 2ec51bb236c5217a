"""Corrections to Triton's interpreter, which runs kernels on CPU tensors for tests.

It keeps bfloat16 as raw 16-bit integers. Its matrix product multiplies those integers, and its casts from float32 cut
bits off where a GPU rounds to the nearest even. And its float32 products depend on the order of the operands, as the
host's BLAS blocks them: (A·B)ᵀ and Bᵀ·Aᵀ differ, which on a GPU they do not. Here all three do what the hardware does.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values):
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def correct() -> None:
    """Patch the interpreter; calling it again changes nothing."""
    if getattr(InterpreterBuilder, "corrected", False):
        return
    InterpreterBuilder.corrected = True
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *options):
        a, b = (TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        if a.data.dtype.kind != "f" or d.data.dtype != np.float32:
            return dot(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle((product + d.data).astype(np.float32), tl.float32)

    def cast_impl(self, source, target):
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(_widen(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(_narrow(source.data), tl.bfloat16)
        if source.dtype.scalar.is_int() and target.scalar == tl.bfloat16:
            return cast_impl(self, cast(self, source, tl.float32), tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"):
        setattr(InterpreterBuilder, name, cast_impl)
