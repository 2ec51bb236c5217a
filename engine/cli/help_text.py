"""Help texts that read well: a docstring's line breaks are those of the source, a terminal's are its own.

tyro keeps the breaks of a field's docstring, leaves a class's docstring in one line however narrow the terminal is, and
calls a flag that may be left out `{None}|INT`.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import sys
import textwrap
from functools import lru_cache
from types import MappingProxyType
from typing import get_args, get_type_hints

BOX = "│╭╰ "  # how lines of its boxes begin, the last where a terminal has ASCII alone
STYLE = re.compile(r"\x1b\[[0-9;]*m")
OR_NONE = re.compile(r"\{None\}\|(\w+\]?|\{\[.*?\]\})|\{None,([\w,]+)\}")


def unwrap_docstrings(kind: type) -> None:
    """Give the fields of a dataclass, and of those in it, their docstrings as help, each in one line."""
    for field in dataclasses.fields(kind):
        described = next(filter(None, (_docstrings(each).get(field.name) for each in kind.__mro__)), None)
        if described:
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(described.split())})
    for hint in get_type_hints(kind).values():
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                unwrap_docstrings(inner)


@lru_cache
def _docstrings(kind: type) -> dict[str, str | None]:
    """The docstrings of a class's own fields."""
    if not dataclasses.is_dataclass(kind):
        return {}
    import docstring_parser  # tyro's way to read them

    return {each.arg_name: each.description for each in docstring_parser.parse_from_object(kind).params}


class Help(io.StringIO):
    """Output stream for tyro's help, formatted as for standard output; `shown` wraps it to the terminal."""

    encoding = property(lambda self: sys.__stdout__ and sys.__stdout__.encoding)  # type: ignore[assignment]

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()

    def shown(self) -> str:
        """The text with lines no longer than the terminal's, and flags without `None` among their values."""
        columns = shutil.get_terminal_size().columns
        return "\n".join(_line(line, columns) for line in self.getvalue().splitlines())


def _line(line: str, columns: int) -> str:
    plain = STYLE.sub("", line)
    if plain[:1] and plain[:1] in BOX:
        return OR_NONE.sub(lambda found: _without_none(found).ljust(len(found[0])), line)
    line = OR_NONE.sub(_without_none, line)
    return line if len(plain) <= columns else textwrap.fill(line, columns, break_on_hyphens=False)


def _without_none(found: re.Match[str]) -> str:
    return found[1] or f"{{{found[2]}}}"
