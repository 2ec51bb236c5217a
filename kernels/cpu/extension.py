"""The CPU engine in C++, `warploom._native`: one place that loads it, and says so where it is missing."""

import os
import warnings
from types import ModuleType
from typing import Any


def load() -> ModuleType | None:
    """The extension, or None where PyTorch is to do its work: it was not built, or WARPLOOM_NATIVE=0 asks for that."""
    if os.environ.get("WARPLOOM_NATIVE") == "0":
        return None
    if __name__.startswith("kernels."):  # transformers looks for such a package, and a clone's root is on sys.path
        return None
    try:
        from ... import _native
    except ImportError as error:
        warnings.warn(
            f"warploom's C++ engine is missing ({error}): a CPU trains and serves by PyTorch alone, more slowly. "
            "`warploom doctor` says how to get it; WARPLOOM_NATIVE=0 says that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _native


native: Any = load()  # without a stub file: its functions check what they are given
