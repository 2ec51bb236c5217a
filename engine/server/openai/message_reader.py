"""Readers of a model's text: what it reasons, what it says, and which tools it calls.

A text comes in pieces, cut anywhere. A reader passes on at once what is certain and keeps back the rest, and its
results do not depend on the cuts: the answer in a stream is the answer in one piece. A call is passed on when it is
complete. What only looks like one (not JSON that every client can read, arguments that are no object, a tool that was
not offered) is text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import regex

from .tool_formats import FORMATS, Call, Schemas, ToolFormat, read_json


@dataclass(slots=True)
class Delta:
    """Part of a message; calls come with their numbers."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def __add__(self, later: Delta) -> Delta:
        return Delta(self.reasoning + later.reasoning, self.content + later.content, self.calls + later.calls)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class PlainReader:
    """Passes text through, and counts calls for the readers that find some."""

    def __init__(self, limit: int | None = None) -> None:
        self._count, self._limit = 0, limit

    def push(self, text: str) -> Delta:
        """Deltas that are certain now."""
        return Delta(content=text)

    def finish(self) -> Delta:
        """Deltas that were kept back."""
        return Delta()

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the message ended: to call tools, if it does."""
        return "tool_calls" if reason == "stop" and self._count else reason

    def _add_calls(self, delta: Delta, calls: Iterable[Call]) -> None:
        for name, arguments in calls:
            if self._limit is not None and self._count >= self._limit:
                return
            delta.calls.append((self._count, as_call(name, arguments)))
            self._count += 1


class MessageReader(PlainReader):
    """Splits a text into reasoning between two marks, content, and calls in one of the formats."""

    def __init__(
        self,
        row: ToolFormat | None,
        schemas: Schemas,
        thoughts: tuple[str, str] | None,
        reasoning: str | None,
        limit: int | None = None,
    ) -> None:
        super().__init__(limit)
        self._row: Any = row
        self._schemas, self._thoughts = schemas, thoughts or ("", "")
        self._step = {"inside": self._think, "free": self._start}.get(reasoning or "", self._say)
        self._opens = (*row.opens, *([row.close] if row.close else ())) if row else ()
        self._held = self._space = ""  # white space at the end: dropped if a call follows
        self._fresh = True  # nothing but white space since the last mark
        self._enough = 0  # characters that are worth looking at an incomplete call again

    def push(self, text: str) -> Delta:
        self._held += text
        return self._read(final=False)

    def finish(self) -> Delta:
        return self._read(final=True)

    def _read(self, final: bool) -> Delta:
        delta = Delta()
        while self._step(delta, final):
            pass
        return delta

    def _start(self, delta: Delta, final: bool) -> bool:
        """Reasoning may begin, with its mark."""
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
        """Read content up to where a call begins, and the call."""
        text, found = self._held, self._find(self._held)
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

    def _find(self, text: str) -> int | None:
        """The place at which a call may begin."""
        if self._row and self._row.only_first:
            start = len(text) - len(text.lstrip())
            return start if self._fresh and text.startswith(self._opens, start) else None
        places = [place for mark in self._opens if (place := text.find(mark)) >= 0]
        return min(places, default=None)

    def _keep(self, text: str) -> int:
        """Length of the end that may yet begin a call."""
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
    """Reads the channels of gpt-oss: analysis is reasoning, a recipient makes it a call, the rest is content."""

    _END = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
    _HEADS = ("<|channel|>", "<|start|>", "to=functions.")
    _RECIPIENT = regex.compile(r"to=functions\.([\w.-]+)")

    def __init__(self, schemas: Schemas, limit: int | None = None) -> None:
        super().__init__(limit)
        self._schemas, self._held, self._body = schemas, "", ""
        self._kind: str | None = None  # of the message being read: reasoning, content, or the tool that is called
        self._first = True

    def push(self, text: str) -> Delta:
        self._held += text
        return self._read(final=False)

    def finish(self) -> Delta:
        delta = self._read(final=True)
        self._close(delta)
        return delta

    def _read(self, final: bool) -> Delta:
        delta = Delta()
        while self._held and (self._head(delta, final) if self._kind is None else self._text(delta, final)):
            pass
        return delta

    def _head(self, delta: Delta, final: bool) -> bool:
        """Read up to where a message's text begins; a text without any head is content."""
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
) -> PlainReader:
    """The reader of one message."""
    if thoughts == FORMATS[1].thoughts:
        return HarmonyReader(schemas, limit)
    if reasoning is None and not schemas:
        return PlainReader()
    return MessageReader(row if schemas else None, schemas, thoughts, reasoning, limit)


def as_call(name: str, arguments: dict) -> dict[str, Any]:
    """A call in OpenAI's shape."""
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    function = {"name": name, "arguments": written}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _tail(text: str, marks: tuple[str, ...]) -> str:
    """The longest end of a text that begins one of the marks."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    return next((text[-n:] for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), "")
