"""The model that a verb works on: the first positional argument, or `--model MODEL` for who is used to that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..errors import InputError
from ..serving.options import LLMOptions

NAMED = "a directory, a .gguf file or a Hub id"


@dataclass(frozen=True)
class ModelOptions(LLMOptions):
    """Options of a model to load, and how to run it."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model: a directory, a .gguf file or a Hub id, org/name[@revision]; --model MODEL says the same."""


def model_first(argv: list[str], after: int = 0) -> list[str]:
    """The command line with the value of `--model` in the place of the positional argument, behind `after` others; of
    several the last, as of any flag."""
    rest, found = list(argv), []
    for word in argv:
        if word.partition("=")[0] != "--model":
            continue
        at = rest.index(word)
        value = rest[at + 1 : at + 2] if word == "--model" else [word.partition("=")[2]]
        if not value or not value[0] or value[0].startswith("-"):
            raise InputError(f"--model needs a value: {NAMED}")
        del rest[at : at + 1 + (word == "--model")]
        found = value
    return [*rest[:after], *found, *rest[after:]]
