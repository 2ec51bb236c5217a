"""Fixes for Triton's interpreter, which runs kernels on CPU tensors for tests.

It keeps bfloat16 as raw 16-bit integers. Its matrix product multiplies those integers, and its casts from float32 cut
bits off where a GPU rounds to the nearest even, and of float8 it drops a carry. And its float32 products depend on the
order of the operands, as the host's BLAS blocks them: (A·B)ᵀ and Bᵀ·Aᵀ differ, which on a GPU they do not. Here all do
what the hardware does.
Its loop bounds are arrays of one number, which Triton 3.6 hands to NumPy as a number; since 2.5 NumPy refuses that.

The interpreter would follow any pointer; here an address outside the kernel's arguments is an error that names the
kernel. Its program id is a global variable: two threads that interpreted at once would take each other's ids and write
to wrong places. So a lock lets one run at a time.
"""

import threading

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def _widen(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values):
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


class Arena:
    """Valid address range of a kernel launch: from the first to the last element of each argument."""

    def __init__(self, kernel: str, arguments) -> None:
        self.kernel = kernel
        extents = sorted(self._extents(arguments))
        self.firsts = np.array([first for first, _ in extents], dtype=np.uint64)
        # Of overlapping arguments the one that begins last need not be the one that ends last.
        self.ends = np.maximum.accumulate(np.array([end for _, end in extents], dtype=np.uint64))

    def _extents(self, arguments):
        for x in arguments:
            x = getattr(x, "base", x)  # of a tensor descriptor
            if isinstance(x, tuple):
                yield from self._extents(x)
            elif hasattr(x, "data_ptr") and x.numel():
                span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
                yield x.data_ptr(), x.data_ptr() + span * x.element_size()

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
        """Bounds check: raise IndexError unless every unmasked address of `size` bytes lies in an argument."""
        wanted = addresses[np.broadcast_to(mask.astype(bool), addresses.shape)].astype(np.uint64)
        place = np.searchsorted(self.firsts, wanted, side="right")
        outside = place == 0
        if len(self.ends):
            outside |= wanted + np.uint64(size) > self.ends[np.maximum(place, 1) - 1]
        if outside.any():
            raise IndexError(f"{self.kernel} {what} outside its arguments: {outside.sum()} of {wanted.size} addresses")


def _watch_addresses() -> None:
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    add, swap = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    gather_arguments = GridExecutor._init_args_hst
    arena = Arena("no kernel", [])

    def note_arguments(self, args, kwargs):
        nonlocal arena
        here = gather_arguments(self, args, kwargs)
        arena = Arena(self.fn.__name__, [*here[0], *here[1].values()])
        return here

    def create_masked_load(self, ptrs, mask, *rest, **options):
        bits = ptrs.get_element_ty().primitive_bitwidth
        arena.check(ptrs.data, np.asarray(mask.data), max(1, bits // 8), "reads")
        return load(self, ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        arena.check(ptrs.data, np.asarray(mask.data), value.data.dtype.itemsize, "writes")
        return store(self, ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(self, op, ptr, value, mask, *rest):
        arena.check(ptr.data, np.asarray(mask.data), value.data.dtype.itemsize, "writes")
        return add(self, op, ptr, value, mask, *rest)

    def create_atomic_cas(self, ptr, cmp, value, *rest):
        arena.check(ptr.data, np.ones(1, dtype=bool), value.data.dtype.itemsize, "writes")
        return swap(self, ptr, cmp, value, *rest)

    GridExecutor._init_args_hst = note_arguments
    for watched in (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas):
        setattr(InterpreterBuilder, watched.__name__, watched)


def _take_turns() -> None:
    launch, turn = GridExecutor.__call__, threading.RLock()

    def launch_alone(self, *args, **options):
        with turn:
            return launch(self, *args, **options)

    GridExecutor.__call__ = launch_alone


def correct() -> None:
    """Patch the interpreter; idempotent."""
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

    convert = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, source, target, rounding):
        if source.dtype.scalar != tl.float32 or target.scalar not in FLOAT8:
            return convert(self, source, target, rounding)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).to(FLOAT8[target.scalar])
        return TensorHandle(values.view(torch.uint8).numpy(), target.scalar)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    _watch_addresses()
    _take_turns()
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index
    names = "create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"
    for name, function in {"create_fp_to_fp": create_fp_to_fp, **dict.fromkeys(names, cast_impl)}.items():
        setattr(InterpreterBuilder, name, function)
