"""Kernel launch under PyTorch: direct calls in eager mode, registered operators under torch.compile and tracing.

A *launcher* is a function that allocates outputs and launches kernels. `torch.compile`, fake tensors and tracing need
it as an operator with a schema; plain eager does not, and the operator boundary costs tens of microseconds a call. So
`launcher` registers the function once as `torch.ops.warploom.<name>`, as a traceable operator through which Inductor
sees the kernels themselves, and calls the function directly whenever the tensors are real.

`AutogradOp` joins a forward launcher with its backward in both worlds: an `autograd.Function` for plain eager, the
operator's registered formula for the rest, from the same two functions.
"""

import functools
from collections.abc import Callable
from typing import Any, overload

import torch

from .lang import HAS_TRITON, INTERPRET

_REAL = (torch.Tensor, torch.nn.Parameter)


def is_real(args: tuple) -> bool:
    """Return whether these are plain tensors with data: not fake, functional or any other subclass."""
    return all(type(x) in _REAL for x in args if isinstance(x, torch.Tensor))


def launch(kernel, grid: tuple, *args, **options) -> None:
    """Launch a kernel on a grid, or record it while tracing; an empty grid launches nothing."""
    if 0 in grid:
        return
    if not is_real(args):
        if INTERPRET:
            return  # fake tensors: there is nothing to compute, and no compiler that would want to look inside
        kernel = torch.library.wrap_triton(kernel)
        options.pop("sanitize_overflow", None)  # a compiler's option that tracing does not know
    kernel[grid](*args, **options)


class Launcher:
    """Function that launches kernels, with its registered PyTorch operator."""

    def __init__(self, function: Callable, mutates: tuple[str, ...] = ()):
        functools.update_wrapper(self, function)
        self.function = function
        self.operator = None
        if not HAS_TRITON:
            return  # never callable, and registering operators imports half of the compiler, a second or two
        name = function.__name__.strip("_")
        register = torch.library.custom_op if INTERPRET else torch.library.triton_op
        self.definition = register(f"warploom::{name}", function, mutates_args=mutates)
        if INTERPRET:
            self.definition.register_fake(function)
        self.operator = getattr(torch.ops.warploom, name).default

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not is_real((*args, *kwargs.values())):
            return self.operator(*args, **kwargs)
        return self.function(*args, **kwargs)


@overload
def launcher(function: Callable) -> Launcher: ...
@overload
def launcher(*, mutates: tuple[str, ...]) -> Callable[[Callable], Launcher]: ...
def launcher(function: Callable | None = None, *, mutates: tuple[str, ...] = ()) -> Any:
    """Wrap a function as a `Launcher`; `mutates` names the arguments it writes to."""
    return functools.partial(Launcher, mutates=mutates) if function is None else Launcher(function, mutates)


class AutogradOp:
    """Differentiable launcher: `save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs."""

    def __init__(self, forward: Launcher, save: Callable, backward: Callable):
        self.forward = forward
        if forward.operator is not None:
            forward.definition.register_autograd(
                backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs, output)
            )
        self.function = type(
            forward.__name__,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward.function),
                "setup_context": staticmethod(save),
                "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
            },
        )

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not is_real(args):
            return self.forward.operator(*args)
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return self.function.apply(*args)
        return self.forward.function(*args)


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x with unit stride in its last dimension; copied only if it is expanded or strided there."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x (…, D) as (N, D); copied only where strides allow no view."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@functools.cache
def sm_count(device: torch.device) -> int:
    """Number of multiprocessors to fill: an H100's without a GPU, a few in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3
