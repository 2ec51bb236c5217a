"""Tuned launch settings by device family and kernel, checked in; an analytic default for everything else.

`tuned.json` maps family → kernel → key → settings. A key describes what the settings may depend on: widths and head
sizes, never the number of rows, for batch invariance. Nothing is tuned at run time:
`warploom bench kernels --tune` searches on a GPU and rewrites the file.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .lang import AMD, architecture

FILE = Path(__file__).with_name("tuned.json")
_trial: dict[str, dict] = {}
asked: dict[str, tuple[str, dict]] = {}
"""For every kernel launched so far: the last key it asked for and its default. The tuner reads this."""


@functools.cache
def _table() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def family(device: torch.device) -> str:
    """Device family of the tuning file: "sm_90" for a Hopper GPU, "none" without a GPU.

    Meta tensors stand for the GPU that is compiled for, so that budgets hold for what was tuned."""
    if device.type == "cpu":
        return "none"
    arch = architecture(device)
    return "gfx" if arch == AMD else f"sm_{arch}"


def tuned(kernel: str, device: torch.device, key: object, default: dict) -> dict:
    """Launch settings of a kernel: tuned ones for this family and key, over `default`."""
    asked[kernel] = (str(key), default)
    if _trial and kernel in _trial:
        return {**default, **_trial[kernel]}
    found = _table().get(family(device), {}).get(kernel, {}).get(str(key))
    return {**default, **found} if found else default


@contextmanager
def trying(kernel: str, settings: dict) -> Iterator[None]:
    """Context that forces these settings for `kernel`, for the tuner."""
    _trial[kernel] = settings
    try:
        yield
    finally:
        del _trial[kernel]


def record(device: torch.device, kernel: str, key: str, settings: dict) -> None:
    """Write a tuning result to the file."""
    table = _table()
    table.setdefault(family(device), {}).setdefault(kernel, {})[key] = settings
    temporary = FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(FILE)
