"""Pointwise and row-wise CPU kernels in C++ (csrc/cpu/training/pointwise.cpp): norms, gates, RoPE and losses, forward
and backward.

Eager PyTorch walks memory once an operation. Beside matrix products, that is where a training step on a CPU spends its
time: a gate takes three passes forward and seven back, a norm with its residual nine and twelve. Here each reads its
operands once, computes in float32 whatever they are stored in, and writes its results once. The passes borrow torch's
own threads (csrc/cpu/training/omp_threads.hpp), and take every sum in an order of its own that no number of threads
changes.

They serve float32 and bfloat16. Anything else, tracing included, goes the way it would go without the extension.

N rows, D columns.
"""

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

from ..core.launch import as_rows, is_real
from .extension import native as _native

HAS_NATIVE = _native is not None
FORMATS = torch.float32, torch.bfloat16
GATES = {"silu": 0, "gelu": 1, "relu": 2, "relu2": 3, "clamped": 5}
CHUNK = 64  # rows a partial sum: NormBackward::kChunk


def find_openmp() -> tuple[int, ...] | None:
    """Addresses of three functions of the OpenMP runtime that torch uses; None if there is none.

    GNU's library and LLVM's and Intel's all have them. Whichever it is and wherever it lies, it is among the libraries
    that torch's own depends on, and a symbol is looked up in all of those.
    """
    for path in mapped_libraries("libtorch_cpu", "libtorch", "libgomp", "libiomp5", "libomp"):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return None


def mapped_libraries(*names: str) -> list[str]:
    """Paths of the loaded shared libraries of these names, in the order of the names."""
    paths = _mapped_files()
    return [path for name in names for path in paths if re.match(rf"{name}[.-]", Path(path).name)]


def _mapped_files() -> list[str]:
    """Paths of the files mapped into the process, by /proc or by macOS's dynamic linker."""
    if sys.platform == "darwin":
        dyld = ctypes.CDLL(None)
        dyld._dyld_get_image_name.restype = ctypes.c_char_p
        return [os.fsdecode(dyld._dyld_get_image_name(i) or b"") for i in range(dyld._dyld_image_count())]
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # neither
        return []
    return list(dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "/" in line))


_openmp = find_openmp() if HAS_NATIVE else None
if _openmp:
    _native.use_openmp(*_openmp)
HAS_OPENMP = _openmp is not None


def is_supported(*tensors: torch.Tensor) -> bool:
    """Return whether the C++ loops take these tensors: on a CPU, of one supported dtype, with data.

    And they have all the threads that torch's own operations would have."""
    dtype = tensors[0].dtype
    return (
        HAS_NATIVE
        and (HAS_OPENMP or torch.get_num_threads() == 1)
        and dtype in FORMATS
        and all(x.device.type == "cpu" and x.dtype == dtype for x in tensors)
        and is_real(tensors)
        and not torch.compiler.is_compiling()
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View x (…, D) as (N, D) with unit stride inside rows, where possible."""
    rows = as_rows(x)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class _Norm(torch.autograd.Function):
    """Autograd function of (optional residual add and) RMSNorm: (normed, sum) or (normed, x)."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        x_ND, weight_D = _rows(x), weight.contiguous()
        residual_ND = None if residual is None else _rows(residual)
        N, D = x_ND.shape
        y = torch.empty(x.shape, dtype=x.dtype)
        sum_ND = x_ND if residual is None else torch.empty(N, D, dtype=x.dtype)
        inverse_N = torch.empty(N)
        _native.norm_forward(eps, x_ND, residual_ND, weight_D, y, None if residual is None else sum_ND, inverse_N)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sum_ND, weight_D, inverse_N)
        ctx.shape = x.shape
        return y if residual is None else (y, sum_ND.view(x.shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dsum=None):
        if dy is None:
            return dsum, dsum, None, None
        sum_ND, weight_D, inverse_N = ctx.saved_tensors
        N, D = sum_ND.shape
        dy_ND, dsum_ND = _rows(dy), None if dsum is None else _rows(dsum)
        dx, dweight_D = torch.empty(ctx.shape, dtype=dy.dtype), torch.empty_like(weight_D)
        partial = torch.empty((N + CHUNK - 1) // CHUNK, D)
        _native.norm_backward(sum_ND, dy_ND, dsum_ND, weight_D, inverse_N, dx, partial, dweight_D)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight_D, None


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """C++ version of `rms_norm`."""
    return _Norm.apply(x, None, weight, eps)


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """C++ version of `add_rms_norm`."""
    return _Norm.apply(x, residual, weight, eps)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        gate_ND, up_ND = _rows(gate), _rows(up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        _native.gate_forward(GATES[activation], gate_ND, up_ND, y)
        ctx.save_for_backward(gate_ND, up_ND)
        ctx.activation, ctx.shape = activation, gate.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate_ND, up_ND = ctx.saved_tensors
        dgate_ND, dup_ND = (torch.empty(gate_ND.shape, dtype=dy.dtype) for _ in range(2))
        _native.gate_backward(GATES[ctx.activation], gate_ND, up_ND, _rows(dy), dgate_ND, dup_ND)
        return dgate_ND.view(ctx.shape), dup_ND.view(ctx.shape), None


class _PackedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, activation):
        both = _rows(gate_up)
        gate_ND, up_ND = both.chunk(2, -1)
        y = torch.empty(*gate_up.shape[:-1], gate_ND.shape[1], dtype=gate_up.dtype)
        _native.gate_forward(GATES[activation], gate_ND, up_ND, y)
        ctx.save_for_backward(both)
        ctx.activation, ctx.shape = activation, gate_up.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (both,) = ctx.saved_tensors
        d_both = torch.empty(both.shape, dtype=dy.dtype)
        _native.gate_backward(GATES[ctx.activation], *both.chunk(2, -1), _rows(dy), *d_both.chunk(2, -1))
        return d_both.view(ctx.shape), None


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """C++ version of `swiglu`."""
    return _Gate.apply(gate, up, activation)


def packed_gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """C++ version of `swiglu_packed`."""
    return _PackedGate.apply(gate_up, activation)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions):
        if positions is not None:
            positions = positions.expand(q.shape[:-2]).long().contiguous()
        ctx.save_for_backward(cos, sin, positions)
        return tuple(_rotated(x, cos, sin, positions, 1.0) for x in (q, k))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        tables = ctx.saved_tensors  # once: a recomputed block gives them only once
        return *(_rotated(x, *tables, -1.0) for x in (dq, dk)), None, None, None


def _rotated(x, cos, sin, positions, sign) -> torch.Tensor:
    x_BTHD = x.reshape(-1, *x.shape[-3:])
    x_BTHD = x_BTHD if x_BTHD.stride(-1) == 1 else x_BTHD.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.rope(sign, x_BTHD, cos, sin, positions, y)
    return y


def rope(q, k, cos, sin, positions=None) -> tuple[torch.Tensor, torch.Tensor]:
    """C++ version of `rope`, half-split."""
    return _Rope.apply(q, k, cos, sin, positions)


def attention(q, k, v, o, stats, scale: float, *gradients: torch.Tensor) -> None:
    """Causal attention of (B, T, H, D) over (B, T, K, D), into o and each query's softmax statistics (2, B, H, T).

    Given (dq, dk, dv) too, the gradients instead, from that of the result in the place of o and the statistics."""
    _native.attention(scale, stats, q, k, v, o, *gradients)


def entropy(logits_NV, targets_N, upstream_N, ignore_index: int, smoothing: float, z_loss: float) -> torch.Tensor:
    """Losses of the rows; given their upstream gradients, overwrites the logits with their gradients."""
    losses_N, targets_N = torch.empty(len(logits_NV)), targets_N.contiguous()
    upstream_N = None if upstream_N is None else upstream_N.contiguous()
    _native.cross_entropy(ignore_index, smoothing, z_loss, logits_NV, targets_N, upstream_N, losses_N)
    return losses_N


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, targets_N, *options):
        losses_N, log_sums_N = torch.empty(2, len(logits_NV))
        _native.cross_entropy(*options, logits_NV, targets_N, None, losses_N, log_sums_N)
        ctx.save_for_backward(logits_NV, targets_N, log_sums_N)
        ctx.options = options
        return losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_N):
        logits_NV, targets_N, log_sums_N = ctx.saved_tensors
        gradient = torch.empty_like(logits_NV)
        upstream_N = upstream_N.contiguous()
        _native.cross_entropy(*ctx.options, logits_NV, targets_N, upstream_N, None, log_sums_N, gradient)
        return gradient, None, None, None, None


def cross_entropy(logits, targets, ignore_index: int, smoothing: float, z_loss: float) -> torch.Tensor:
    """C++ version of `cross_entropy`, unreduced."""
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    losses_N = _Entropy.apply(rows, targets.reshape(-1).contiguous(), ignore_index, smoothing, z_loss)
    return losses_N.view(targets.shape)
