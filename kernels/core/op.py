"""Op records: reference, fused kernel, test cases and budgets, and the dispatch between backends.

An `Op` ties together everything one needs to know about a fused operation. `reference` is the definition and the test
oracle: plain PyTorch, differentiable, exact in float64. `fused` is the Triton implementation with the same signature.
`eager` is optional: where PyTorch has something faster with the same meaning (on a CPU, say), the eager path calls it
instead of the reference; tests hold it to the same oracle. The rest of the record is the spec from which parity tests,
gradient checks, budgets and roofline rows are generated, so every op is tested.

Calling an `Op` runs the path that `backend` selects:

    with backend("eager"): ...     # PyTorch only
    with backend("triton"): ...    # the fused kernels; on a CPU this needs TRITON_INTERPRET=1
    with backend("auto"): ...      # the default: fused on a GPU, eager elsewhere

`WARPLOOM_BACKEND` sets the default of the process.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from .lang import HAS_TRITON, INTERPRET

try:
    from ...tokenizer.errors import InputError
except ImportError:  # the kernels without the rest of the package
    InputError = ValueError

BACKENDS = ("auto", "triton", "eager")
_REGISTRY: dict[str, "Op"] = {}
P = ParamSpec("P")
R = TypeVar("R")


def _valid_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source} is {name!r}; valid are {', '.join(BACKENDS)}")
    return name


_backend = _valid_backend(os.environ.get("WARPLOOM_BACKEND", "auto"), "WARPLOOM_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context that selects the backend of ops: "eager", "triton" or "auto"; process-wide."""
    global _backend
    before, _backend = _backend, _valid_backend(name, "backend")
    try:
        yield
    finally:
        _backend = before


def ops() -> list["Op"]:
    """Every op of the package, alphabetically."""
    return [_REGISTRY[name] for name in sorted(_REGISTRY)]


@dataclass(frozen=True, slots=True)
class Case:
    """Test or benchmark case: one call of an op.

    `make` receives a `Maker` and returns the positional arguments; `options` are the keyword arguments, or those
    of them that are no tensors: `make` may end with a mapping of more.
    """

    name: str
    make: Callable[["Maker"], tuple]
    options: Mapping[str, Any] = field(default_factory=dict)
    bench: bool = False
    """Benchmark case, too large for the interpreter: timed on a GPU, and compiled ahead of time for its budget."""
    expanded: bool = False
    """The gradient arrives expanded with stride 0, as from `.sum().backward()`."""
    steep: bool = False
    """Ill-conditioned: a rounding of its inputs changes the result by far more than its own rounding; see `verify`."""

    def build(self, maker: "Maker") -> tuple[list, dict]:
        """Make the arguments of the call."""
        *args, last = self.make(maker)
        if isinstance(last, dict):
            return args, {**self.options, **last}
        return [*args, last], dict(self.options)


@dataclass(frozen=True, slots=True)
class Budget:
    """Resource budget of a kernel: registers, spills (stack bytes), shared memory. Loops may never spill."""

    registers: int = 255
    stack: int = 0
    shared: int = 227 * 1024
    wgmma: bool = False
    """Must use the Hopper tensor-core instructions on sm_90."""
    vector: bool = False
    """Must access global memory 16 bytes at a time."""
    copies: int = 0
    """Pipeline depth: tiles that its loop must load ahead of the product on sm_90."""
    products: int = 0
    """wgmma products that its loop must keep in flight on sm_90: 0 where each is waited for at once."""
    tensor_share: float = 0.0
    """Part of its loop's time in which shared memory must leave tensor cores busy on sm_90."""
    streams: bool = False
    """Its loop has no barrier between warps."""


class Maker:
    """Factory of a case's tensors: the same numbers on every device and in every dtype, up to rounding."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype=None, grad: bool = True):
        """Normal noise; a leaf that requires a gradient by default."""
        x = self._draw(torch.randn, shape) * scale + shift
        return x.to(self.device, dtype or self.dtype).requires_grad_(grad)

    def strided(self, *shape: int, grad: bool = True):
        """Normal noise with stride 2 in the last dimension."""
        x = self._draw(torch.randn, (*shape[:-1], 2 * shape[-1]))
        return x.to(self.device, self.dtype)[..., ::2].detach().requires_grad_(grad)

    def padded(self, *shape: int, grad: bool = True):
        """Normal noise whose rows have a gap between them (unit stride inside)."""
        x = self._draw(torch.randn, (*shape[:-1], shape[-1] + 8))
        return x.to(self.device, self.dtype)[..., : shape[-1]].detach().requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int, dtype=torch.int64):
        """Uniform integers in [low, high)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def tensor(self, values, dtype=None):
        """A tensor of these values."""
        return torch.tensor(values, dtype=dtype).to(self.device)

    def _draw(self, sampler, shape):
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        if self.device.type == "cuda" and torch.Size(shape).numel() > 1 << 24:
            return sampler(shape, device=self.device)  # too large to draw on the host and copy
        return sampler(shape, generator=self.generator)


@dataclass(eq=False, kw_only=True)
class Op(Generic[P, R]):
    """Fused operation, called with its reference's signature. See the module's docstring."""

    reference: Callable[P, R]
    fused: Callable[..., R] | None = None
    eager: Callable[..., R] | None = None
    name: str = ""
    cases: list[Case] = field(default_factory=list)
    mutates: tuple[str, ...] = ()
    """Parameters written in place; tests compare them as if they were returned."""
    native: bool = False
    """On a CPU, the eager path (except matrix products) runs in the C++ extension, where that is built."""
    shapes: str = ""
    """Sizes that must agree, a letter each: "x ... D, weight D"; `...` are any leading ones, the same for all.

    A kernel addresses memory by them, so a fused call refuses what does not fit. Parameters that are None do."""
    rows: tuple[str, ...] = ()
    """Parameters whose first dimension counts rows that do not influence each other, to the last bit."""
    autocast: bool | None = False
    """Under autocast: True casts floating-point inputs to its dtype first, as for a matrix product; False computes as
    without it, on whatever arrives; None leaves it to the op."""
    traffic: Callable | None = None
    """(*args, **options) -> bytes that forward and backward must move: the roofline's denominator."""
    flops: Callable | None = None
    """(*args, **options) -> floating-point operations of forward and backward."""
    budget: Budget | Mapping[str, Budget] = Budget()
    """For every kernel the op launches, or by kernel name."""

    def __post_init__(self):
        functools.update_wrapper(self, self.reference, updated=())
        self.name = self.name or self.reference.__name__
        self.__name__ = self.__qualname__ = self.name
        self._names = tuple(inspect.signature(self.reference).parameters)
        self._fitting: set[tuple] = set()
        self._written = {i for i, name in enumerate(self._names) if name in self.mutates}
        self._sizes = {name: sizes for name, *sizes in map(str.split, filter(None, self.shapes.split(",")))}
        _REGISTRY[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        device = _device_of(self.name, args, kwargs)
        if self.autocast is None or device.type == "meta" or not torch.is_autocast_enabled(device.type):
            return self._run(device, args, kwargs)
        given: tuple[Sequence, Mapping] = args, kwargs
        if self.autocast:
            dtype = torch.get_autocast_dtype(device.type)
            given = [_cast(x, dtype) for x in args], {name: _cast(x, dtype) for name, x in kwargs.items()}
        with torch.autocast(device.type, enabled=False):
            return self._run(device, *given)

    def _run(self, device: torch.device, args: Sequence, kwargs: Mapping) -> R:
        if not self._takes_fused(device, args, kwargs) or self.fused is None:
            plain: Callable[..., R] = self.eager or self.reference
            return plain(*args, **kwargs)
        args, kwargs = self._addressable(args, kwargs)
        if device.type != "cuda" or torch.compiler.is_compiling() or device.index == torch.cuda.current_device():
            return self.fused(*args, **kwargs)
        with torch.cuda.device(device):
            return self.fused(*args, **kwargs)

    def _addressable(self, args: Sequence, kwargs: Mapping) -> tuple[Sequence, Mapping]:
        """Arguments made contiguous and checked, as kernels need them; checked shapes are cached."""
        given = (*args, *kwargs.values())
        shapes = [x.shape if isinstance(x, torch.Tensor) else None for x in given]
        if torch.compiler.is_compiling():  # the cache of checked shapes must not become a guard
            self._check_shapes({**dict(zip(self._names, args)), **kwargs})
        elif (key := (*kwargs, *shapes)) not in self._fitting:
            self._check_shapes({**dict(zip(self._names, args)), **kwargs})
            if len(self._fitting) > 1000:
                self._fitting.clear()
            self._fitting.add(key)
        if any(shape is not None and len(shape) == 1 and x.stride(0) != 1 for x, shape in zip(given, shapes)):
            args = tuple(x if i in self._written else _dense(x) for i, x in enumerate(args))
            kwargs = {name: x if name in self.mutates else _dense(x) for name, x in kwargs.items()}
        return args, kwargs

    def _check_shapes(self, given: Mapping) -> None:
        known: dict[str, Any] = {}
        for name, letters in self._sizes.items():
            x = given.get(name)
            if x is None:
                continue
            shape = x.shape
            if letters[0] == "...":
                inner = max(len(shape) - len(letters) + 1, 0)
                shape = shape[:inner], *shape[inner:]
            if len(shape) != len(letters) or any(known.setdefault(a, n) != n for a, n in zip(letters, shape)):
                sizes = ", ".join(f"{a} = {tuple(n) if isinstance(n, tuple) else n}" for a, n in known.items())
                raise ValueError(
                    f"{self.name}: {name} is {tuple(x.shape)}; it must be ({', '.join(letters)}) with {sizes}"
                )

    def _takes_fused(self, device, args, kwargs) -> bool:
        if _backend == "eager":
            return False
        if _backend == "auto" and device.type != "cuda":
            return False
        double = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in (*args, *kwargs.values()))
        if _backend == "auto":
            return HAS_TRITON and self.fused is not None and not double
        if device.type == "cpu" and not INTERPRET:
            raise InputError('backend is "triton" on CPU tensors: that needs TRITON_INTERPRET=1 in the environment')
        if not HAS_TRITON:
            raise InputError('backend is "triton", but triton is not installed; valid here are auto and eager')
        if self.fused is None:
            raise InputError(f'backend is "triton", but {self.name} has no fused twin; valid for it are auto and eager')
        if double:
            raise InputError(f'backend is "triton", but {self.name} got float64; valid are float32, bfloat16, float16')
        return True


def _device_of(name: str, args, kwargs) -> torch.device:
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor):
            return x.device
    raise ValueError(
        f"{name} got no tensor; it needs {', '.join(inspect.signature(_REGISTRY[name].reference).parameters)}"
    )


def _dense(x):
    """A contiguous vector; anything else unchanged."""
    return x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 and x.stride(0) != 1 else x


def _cast(x, dtype: torch.dtype):
    narrowable = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize in (2, 4)
    return x.to(dtype) if narrowable else x
