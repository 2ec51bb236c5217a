"""Names that are looked up when first used, so that importing a package costs nothing and the command line is quick."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package whose submodules (`homes`) hold these names."""
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name in home_of:
            return getattr(import_module(f".{home_of[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, sorted(home_of)
