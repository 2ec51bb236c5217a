"""Shared parts of the translated protocols: tolerant bodies, messages as content blocks.

Agents send whatever their vendor's newest interface knows. Fields and tools that mean nothing here are passed over, and
named in the answer's header, instead of being refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..openai.body import drop_nulls
from ..openai.errors import from_validation, invalid
from ..openai.message_reader import Delta
from ..openai.requests import ChatRequest


class Tolerant(BaseModel):
    """Body that validates known fields and ignores unknown ones; null means absent."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        return drop_nulls(data)


class AgentRequest(Tolerant):
    """Base of requests that can be translated to a chat."""

    model: str | None = None
    stream: bool = False
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """False: these protocols report usage in events of their own."""
        return False

    @property
    def effort(self) -> str:
        """Reasoning effort of the request; empty if it names none."""
        return ""

    def ignored(self) -> list[str]:
        """Names of ignored fields."""
        tools = [tool for tool in getattr(self, "tools", None) or [] if not is_function(tool)]
        return sorted(self.model_extra or {}) + [f"tools.{str(tool.get('type'))[:64]}" for tool in tools]

    def chat(self) -> ChatRequest:
        """Convert to a chat."""
        raise NotImplementedError


def as_chat(body: AgentRequest) -> ChatRequest:
    """Convert to a chat; raise APIError where that is impossible."""
    try:
        return body.chat()
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False)) from None


def is_function(tool: dict[str, Any]) -> bool:
    """Return whether a tool is a client-side function, in either protocol."""
    return tool.get("type") == "function" or (tool.get("type", "custom") == "custom" and "input_schema" in tool)


def text_of(content: Any, where: str) -> str:
    """Text of a content: a string, or text blocks."""
    if isinstance(content, str) or not content:
        return content or ""
    if not isinstance(content, list):
        raise invalid(f"{where}: must be a text or a list of parts", where)
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise invalid(f"{where}: this model reads text, not parts of type {kind!r}", where)
    return "".join(part["text"] for part in content)


class Blocks:
    """Splits a message's increments into content blocks: where each begins, grows and ends."""

    def __init__(self) -> None:
        self.count = 0  # blocks that have ended
        self.kind: str | None = None  # of the one that is open
        self.value: Any = ""  # … and what it has so far: a text, or a call

    def feed(self, delta: Delta) -> Iterator[tuple[str, str, Any]]:
        """Yield (begin, grow or end; kind; new content, at an end all of it)."""
        for kind, text in (("reasoning", delta.reasoning), ("text", delta.content)):
            if text:
                if self.kind != kind:
                    yield from self._open(kind, "")
                self.value += text
                yield "grow", kind, text
        for _, call in delta.calls:
            function = call["function"]
            if "id" in call:
                yield from self._open("call", {**call, "function": {**function, "arguments": ""}})
            if function["arguments"]:
                self.value["function"]["arguments"] += function["arguments"]
                yield "grow", "call", function["arguments"]

    def close(self) -> Iterator[tuple[str, str, Any]]:
        """End the open block."""
        if self.kind is not None:
            kind, value, self.kind, self.value = self.kind, self.value, None, ""
            yield "end", kind, value
            self.count += 1

    def events(self, delta: Delta, final: bool) -> Iterator[tuple[str, str, Any]]:
        """Yield the events of an increment, and with `final` those of its end."""
        yield from self.feed(delta)
        if final:
            yield from self.close()

    def _open(self, kind: str, value: Any) -> Iterator[tuple[str, str, Any]]:
        yield from self.close()
        self.kind, self.value = kind, value
        yield "begin", kind, value
