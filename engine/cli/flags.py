"""Flags from dataclasses by tyro, with errors as one line."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any, TypeVar

import tyro

from ..errors import InputError

T = TypeVar("T")


def parse(kind: type[T], argv: list[str], verb: str, default: Any = tyro.MISSING_NONPROP) -> T:
    """The dataclass `kind` from a command line: flat kebab-case flags. Mistakes become one InputError."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                prog=f"warploom {verb}",
                args=argv,
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise InputError(_sentence(errors.getvalue(), verb)) from None


def _sentence(box: str, verb: str) -> str:
    """What tyro's box says, without the box: its text up to the first rule."""
    lines = [line.strip("│╭╰╮╯ \n") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    words: list[str] = []
    for line in lines[1:]:
        if set(line) <= {"─"} and words:
            break
        words.append(line)
    return " ".join(" ".join(words).split()) + f" (warploom {verb} --help lists the flags)"
