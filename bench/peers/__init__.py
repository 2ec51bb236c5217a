"""Peers: adapters around other projects, measured beside ours.

A peer is a module here. `NEEDS` names what must be importable (default: nothing); a function named after a task
returns what to time, by the name to print:

    NEEDS = ("transformers",)

    def train(shape) -> dict[str, Callable[[], object]]:
        import transformers
        ...
        return {"transformers": step}

Nothing is registered anywhere: `build("train", shape)` asks every module that has a `train`. A peer that is not
installed, or fails to build, becomes a `Missing` with its reason, and a row of the table that says so. WARPLOOM_PEERS
names the only ones to ask, separated by commas (none if empty), where time is short.
"""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Missing:
    """Reason why a peer cannot be measured here."""

    reason: str


class Unavailable(Exception):
    """Raised by an adapter that cannot do what is asked; the message is one clause."""


Contestants = dict[str, Callable[[], object] | Missing]
Builders = dict[str, Callable[[], Callable[[], object]] | Missing]


def names(package: str = __name__) -> list[str]:
    """Names of all peers."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def build(
    task: str, *args: object, only: Iterable[str] | None = None, package: str = __name__, **options: object
) -> Contestants:
    """Build the contestants of `task`: the functions to time, from every peer that knows it (or those in `only`), with
    the same arguments."""
    contestants: Contestants = {}
    chosen = os.environ.get("WARPLOOM_PEERS")
    for name in names(package) if only is None else only:
        if chosen is not None and name not in chosen.split(","):
            continue
        try:
            peer = importlib.import_module(f"{package}.{name}")
        except Exception as error:  # a peer that cannot even be imported
            contestants[name] = Missing(failure(error))
            continue
        if hasattr(peer, task):
            contestants |= _build(peer, name, task, args, options)
    return contestants


def compiled(call: Callable[..., object]) -> Callable[..., object] | Missing:
    """`torch.compile(call)`; Missing where time is short, as compiling takes ten seconds a shape."""
    if "WARPLOOM_PEERS" in os.environ:
        return Missing("nothing is compiled where WARPLOOM_PEERS is set")
    import torch

    return torch.compile(call)


def _build(peer: ModuleType, name: str, task: str, args: tuple, options: dict) -> Contestants:
    absent = [need for need in getattr(peer, "NEEDS", ()) if not _installed(need)]
    if absent:
        return {name: Missing(f"{' and '.join(absent)} not installed")}
    try:
        return dict(getattr(peer, task)(*args, **options))
    except Unavailable as error:
        return {name: Missing(str(error))}
    except Exception as error:  # a broken peer must not cost our own measurement
        return {name: Missing(failure(error))}


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package is absent, or was replaced by a stub
        return False


def failure(error: BaseException) -> str:
    """Format an exception as one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
