"""Loading of the C++ extension `warploom._native`, by SIMD level."""

import os
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

# The modules (setup.py) that a CPU of each of PyTorch's capabilities runs, best first. ATEN_CPU_CAPABILITY limits both.
MODULES = {
    "AVX512": ("_native_avx512", "_native_avx2", "_native"),
    "AVX2": ("_native_avx2", "_native"),
}


def import_native() -> ModuleType:
    """Import the extension of the widest SIMD level this CPU has; ImportError says why there is none."""
    reasons = []
    for name in MODULES.get(torch.backends.cpu.get_cpu_capability(), ("_native",)):
        try:
            return import_module(f"...{name}", __package__)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError("; ".join(reasons))


def load() -> ModuleType | None:
    """The extension, or None where PyTorch is used instead: not built, or disabled by WARPLOOM_NATIVE=0."""
    if os.environ.get("WARPLOOM_NATIVE") == "0":
        return None
    if __name__.startswith("kernels."):  # transformers looks for such a package, and a clone's root is on sys.path
        return None
    try:
        return import_native()
    except ImportError as error:
        warnings.warn(
            f"warploom's C++ engine is missing ({error}): a CPU trains and serves by PyTorch alone, more slowly. "
            "`warploom doctor` says how to get it; WARPLOOM_NATIVE=0 says that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


native: Any = load()  # without a stub file: its functions check what they are given
