"""Incremental conversion of a tool call's arguments to JSON while the model writes them.

What is read here is held to its schema by a grammar, so it is passed on as it comes: JSON as it stands, tags pair by
pair. Only where it ends has to be found.
"""

from __future__ import annotations

import json
from typing import Protocol

from .tool_formats import PAIRS, properties_of, typed


class ArgumentStream(Protocol):
    """Incremental parser of one call's arguments."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return JSON for the new text, and the rest behind the arguments once they have ended."""
        ...


class JsonArguments:
    """Arguments written as a JSON object."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, text: str) -> tuple[str, str | None]:
        for index, sign in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or sign != '"'
                self._escaped = sign == "\\" and not self._escaped
            elif sign == '"':
                self._in_string = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    return text[: index + 1], text[index + 1 :]
        return text, None


class TaggedArguments:
    """Arguments written as tagged pairs; the schema tells strings from JSON values."""

    def __init__(self, style: str, schema: dict) -> None:
        self._opening, self._closing, self._pair = PAIRS[style]
        self._known = properties_of(schema)
        self._held, self._written = "", 0

    def push(self, text: str) -> tuple[str, str | None]:
        self._held += text
        made = ""
        while True:
            start = self._held.lstrip()
            if not start.startswith(self._opening):
                if self._opening.startswith(start):
                    return made, None
                return made + ("}" if self._written else "{}"), start
            if self._closing not in start or (found := self._pair.match(start)) is None:
                return made, None
            name, value = found.groups()
            value = typed(value, self._known.get(name))
            made += f"{', ' if self._written else '{'}{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
            self._written += 1
            self._held = start[found.end() :]


def argument_stream(style: str, schema: dict) -> ArgumentStream:
    """Make the parser for a notation."""
    return JsonArguments() if style == "json" else TaggedArguments(style, schema)
