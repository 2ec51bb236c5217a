"""Incremental parsers of a model's output: reasoning, content, tool calls.

A text comes in pieces, cut anywhere. A reader passes on at once what is certain and keeps back the rest, and its
results do not depend on the cuts: the answer in a stream is the answer in one piece. Where a grammar holds the model to
well-formed calls (`eager`), a call is passed on from its name on, its arguments as they come; elsewhere when it is
complete. What only looks like one (not JSON that every client can read, arguments that are no object, a tool that was
not offered) is then text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import regex

from .argument_stream import ArgumentStream, JsonArguments, argument_stream
from .tool_formats import FORMATS, Call, Schemas, ToolFormat, read_json


@dataclass(slots=True)
class Delta:
    """Increment of a message; increments of calls carry their index, the first also id and name."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def whole_calls(self) -> list[dict[str, Any]]:
        """Complete calls, once the message has ended."""
        calls: dict[int, dict[str, Any]] = {}
        for number, part in self.calls:
            if "id" in part:
                calls[number] = {**part, "function": {**part["function"]}}
            else:
                calls[number]["function"]["arguments"] += part["function"]["arguments"]
        return list(calls.values())

    def __add__(self, later: Delta) -> Delta:
        return Delta(self.reasoning + later.reasoning, self.content + later.content, self.calls + later.calls)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class PlainReader:
    """Parser of plain text (no tools, no reasoning); base of the others."""

    def __init__(self, limit: int | None = None) -> None:
        self._count, self._limit = 0, limit

    def read(self, text: str, final: bool = True) -> Delta:
        """Parse more text; return what is certain, or with `final` everything."""
        return Delta(content=text)

    def finish_reason(self, reason: str | None) -> str | None:
        """Finish reason; "tool_calls" if there are any."""
        return "tool_calls" if reason == "stop" and self._count else reason

    def _add_calls(self, delta: Delta, calls: Iterable[Call]) -> None:
        for name, arguments in calls:
            if not self._full:
                delta.calls.append((self._count, as_call(name, arguments)))
                self._count += 1

    def _open_call(self, delta: Delta, name: str) -> None:
        """Start a call."""
        self._muted = self._full
        if not self._muted:
            delta.calls.append((self._count, new_call(name, "")))
            self._count += 1

    def _add_arguments(self, delta: Delta, text: str) -> None:
        """Append to the last call's arguments."""
        if text and not self._muted:
            delta.calls.append((self._count - 1, {"function": {"arguments": text}}))

    @property
    def _full(self) -> bool:
        return self._limit is not None and self._count >= self._limit


class MessageReader(PlainReader):
    """Parser of text with reasoning between marks and calls in one of the formats."""

    def __init__(
        self,
        row: ToolFormat | None,
        schemas: Schemas,
        thoughts: tuple[str, str] | None,
        reasoning: str | None,
        limit: int | None = None,
        eager: bool = False,
    ) -> None:
        super().__init__(limit)
        self._row: Any = row
        self._eager = eager and row is not None and row.heads is not None
        self._stream: ArgumentStream = JsonArguments()  # of the call that is being read
        self._schemas, self._thoughts = schemas, thoughts or ("", "")
        self._step = {"inside": self._think, "free": self._start}.get(reasoning or "", self._say)
        self._opens = (*row.opens, *([row.close] if row.close else ())) if row else ()
        self._held = self._space = ""  # white space at the end: dropped if a call follows
        self._fresh = True  # nothing but white space since the last mark
        self._enough = 0  # characters that are worth looking at an incomplete call again

    def read(self, text: str, final: bool = True) -> Delta:
        self._held += text
        delta = Delta()
        while self._step(delta, final):
            pass
        return delta

    def _start(self, delta: Delta, final: bool) -> bool:
        """Parse the beginning, where reasoning may start."""
        text, mark = self._held.lstrip(), self._thoughts[0]
        if not final and mark.startswith(text) and len(text) < len(mark):
            return False
        if text.startswith(mark):
            self._held, self._step = text[len(mark) :], self._think
        else:
            self._step = self._say
        return True

    def _think(self, delta: Delta, final: bool) -> bool:
        before, closed, after = self._held.partition(self._thoughts[1])
        keep = "" if closed or final else _tail(before, (self._thoughts[1],))
        said = before[: len(before) - len(keep)]
        if self._fresh:
            said = said.lstrip()
        trimmed = said.rstrip()
        delta.reasoning += trimmed
        self._fresh = self._fresh and not trimmed
        if not closed:
            self._held = said[len(trimmed) :] + keep if not final else ""
            return False
        self._held, self._step, self._fresh = after, self._after_thought, True
        return True

    def _after_thought(self, delta: Delta, final: bool) -> bool:
        self._held = self._held.lstrip()
        if not self._held:
            return False
        self._step = self._say
        return True

    def _say(self, delta: Delta, final: bool) -> bool:
        """Parse content up to a call, and start the call."""
        text, found = self._held, self._find(self._held)
        if final and self._eager and self._is_begun(text[found or 0 :]):
            self._pass_on(delta, text[: found or 0])
            self._held = ""
            return False
        if found is None:
            keep = 0 if final else self._keep(text)
            self._pass_on(delta, text[: len(text) - keep])
            self._held = text[len(text) - keep :]
            if final and not self._count:
                delta.content += self._space
            return False
        if found:
            self._pass_on(delta, text[:found])
            self._held = text = text[found:]
        if self._count and self._row.close and text.startswith(self._row.close):
            self._held, self._space = text[len(self._row.close) :], ""
            return True
        if self._eager and (opened := self._enter(self._row.heads[0], delta, final)) is not None:
            return opened
        if not final and len(text) < self._enough:
            return False
        scanned = self._row.scan(text, self._schemas, final)
        if scanned is None:
            self._enough = len(text) + len(text) // 32
            return False
        end, calls = scanned
        self._held, self._enough = text[end:], 0
        if calls and all(name in self._schemas for name, _ in calls):
            self._add_calls(delta, calls)
            self._space, self._fresh = "", True
        else:
            self._pass_on(delta, text[:end])
        return True

    def _is_begun(self, text: str) -> bool:
        """Return whether a text is the beginning of a call, cut before its arguments."""
        text, mark = text.strip(), self._row.mark
        if self._count and self._fresh and text and mark.startswith(text):
            return True
        return text.startswith(mark) and _is_cut(text, self._row.heads[0])

    def _enter(self, head: regex.Pattern, delta: Delta, final: bool) -> bool | None:
        """Start a call here: True if one starts, None if not, False if more text is needed."""
        begin = head.match(self._held, partial=not final)
        if begin is not None and begin.partial:
            return False
        if begin is None or begin["name"] not in self._schemas:
            return None
        self._open_call(delta, begin["name"])
        self._held, self._enough, self._step = self._held[begin.end() :], 0, self._read_arguments
        self._space, self._fresh = "", True
        self._stream = argument_stream(self._row.style, self._schemas[begin["name"]])
        return True

    def _read_arguments(self, delta: Delta, final: bool) -> bool:
        """Forward arguments up to their end."""
        piece, rest = self._stream.push(self._held)
        self._add_arguments(delta, piece)
        self._held = rest or ""
        if rest is None:
            return False
        self._step = self._after_call
        return True

    def _after_call(self, delta: Delta, final: bool) -> bool:
        """Parse what follows a call."""
        if not final and not self._held.strip():
            return False
        _, tail, following = self._row.heads
        if following is not None and (opened := self._enter(following, delta, final)) is not None:
            return opened
        end = tail.match(self._held, partial=not final)
        if end is not None and end.partial:
            return False
        if final and end is None and _is_cut(self._held, tail, following):
            self._held = ""
            return False
        rest = self._held[end.end() if end else 0 :]
        if self._row.only_first and not final and not rest.strip():
            return False  # a semicolon may follow
        self._held, self._step = rest, self._say
        return True

    def _find(self, text: str) -> int | None:
        """Position where a call may start."""
        if self._row and self._row.only_first:
            start = len(text) - len(text.lstrip())
            return start if self._fresh and text.startswith(self._opens, start) else None
        places = [place for mark in self._opens if (place := text.find(mark)) >= 0]
        return min(places, default=None)

    def _keep(self, text: str) -> int:
        """Length of the suffix that may start a call."""
        if self._row and self._row.only_first:
            rest = text.lstrip()
            return len(rest) if self._fresh and any(mark.startswith(rest) for mark in self._opens) else 0
        return len(_tail(text, self._opens))

    def _pass_on(self, delta: Delta, text: str) -> None:
        text = self._space + text
        said = text.rstrip() if self._opens else text
        delta.content += said
        self._space = text[len(said) :]
        self._fresh = self._fresh and not said


class HarmonyReader(PlainReader):
    """Parser of gpt-oss's channels: analysis is reasoning, a recipient makes a call, the rest is content."""

    _END = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
    _HEADS = ("<|channel|>", "<|start|>", "to=functions.")
    _RECIPIENT = regex.compile(r"to=functions\.([\w.-]+)")

    def __init__(self, schemas: Schemas, limit: int | None = None, eager: bool = False) -> None:
        super().__init__(limit)
        self._schemas, self._held, self._body, self._eager = schemas, "", "", eager
        self._kind: str | None = None  # of the message being read: reasoning, content, or the tool that is called
        self._first = True

    def read(self, text: str, final: bool = True) -> Delta:
        self._held += text
        delta = Delta()
        while self._held and (self._head(delta, final) if self._kind is None else self._text(delta, final)):
            pass
        if final:
            self._close(delta)
        return delta

    def _head(self, delta: Delta, final: bool) -> bool:
        """Parse a message's header; text without one is content."""
        held = self._held.lstrip()
        if self._first and not any(mark.startswith(held) or held.startswith(mark) for mark in self._HEADS):
            self._kind, self._first = "content", False
            return True
        head, found, rest = held.partition("<|message|>")
        if not found:
            return False
        self._first = False
        called = self._RECIPIENT.search(head)
        self._kind = f"to={called[1]}" if called else "reasoning" if "analysis" in head else "content"
        self._held = rest
        if called and self._eager and called[1] in self._schemas:
            self._open_call(delta, called[1])
            self._kind = "call"
        return True

    def _text(self, delta: Delta, final: bool) -> bool:
        places = [(place, mark) for mark in self._END if (place := self._held.find(mark)) >= 0]
        if places:
            place, mark = min(places)
            self._take(delta, self._held[:place])
            keeps_mark = mark in ("<|start|>", "<|channel|>")
            self._held = self._held[place + (0 if keeps_mark else len(mark)) :]
            self._close(delta)
            return True
        keep = "" if final else _tail(self._held, self._END)
        self._take(delta, self._held[: len(self._held) - len(keep)])
        self._held = keep
        return False

    def _take(self, delta: Delta, text: str) -> None:
        if self._kind == "reasoning":
            delta.reasoning += text
        elif self._kind == "content":
            delta.content += text
        elif self._kind == "call":
            self._add_arguments(delta, text)
        else:
            self._body += text

    def _close(self, delta: Delta) -> None:
        kind, self._kind, body, self._body = self._kind, None, self._body, ""
        if kind is None or not kind.startswith("to="):
            return
        name, arguments = kind[3:], read_json(body)
        if name in self._schemas and isinstance(arguments, dict):
            self._add_calls(delta, [(name, arguments)])
        else:
            delta.content += body


def make_reader(
    row: ToolFormat | None,
    schemas: Schemas,
    thoughts: tuple[str, str] | None,
    reasoning: str | None,
    limit: int | None = None,
    eager: bool = False,
) -> PlainReader:
    """Make the parser of one message; `eager` if a grammar guarantees that what starts like a call is one."""
    if thoughts == FORMATS[1].thoughts:
        return HarmonyReader(schemas, limit, eager)
    if reasoning is None and not schemas:
        return PlainReader()
    return MessageReader(row if schemas else None, schemas, thoughts, reasoning, limit, eager)


def as_call(name: str, arguments: dict) -> dict[str, Any]:
    """Tool call in OpenAI's format."""
    return new_call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def new_call(name: str, arguments: str) -> dict[str, Any]:
    """Tool call in OpenAI's format, with arguments as written."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _is_cut(text: str, *patterns: regex.Pattern | None) -> bool:
    """Return whether a text ends inside the markup around calls, which is no content."""
    found = [pattern.match(text, partial=True) for pattern in patterns if pattern is not None]
    return any(match is not None and match.partial for match in found)


def _tail(text: str, marks: tuple[str, ...]) -> str:
    """Longest suffix of a text that is a prefix of one of the marks."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    return next((text[-n:] for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), "")
