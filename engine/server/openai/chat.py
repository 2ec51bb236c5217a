"""Conversations: messages to the prompt the model was trained on, and its text back to messages and tool calls.

The prompt itself is made by `tokenizer.chat`, which keeps what a user wrote from forging turns. Templates that know
tools teach the model to answer `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; `ToolCallReader` finds those in
a text that comes in pieces.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from pydantic_core import from_json

from ....tokenizer.chat import encode_chat
from . import errors
from .requests import Message, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESERVED = {"messages", "tools", "add_generation_prompt"}


def encode_conversation(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Tool] | None = None,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """The token ids that ask a model for the next message."""
    if tokenizer is None:
        raise errors.invalid("this model has no tokenizer: it cannot chat; send token ids to /v1/completions")
    variables = dict(variables or {})
    if taken := RESERVED & variables.keys():
        raise errors.invalid(f"chat_template_kwargs cannot set {min(taken)}", "chat_template_kwargs")
    if tools:
        if not reads_tools(tokenizer):
            raise errors.invalid("tools: this model's chat template has no tools", "tools", "unsupported_parameter")
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    plain = [_plain(message, tokenizer.chat_template or "") for message in messages]
    return encode_chat(tokenizer, plain, **variables)


def reads_tools(tokenizer: Any) -> bool:
    """Return whether the model's chat template shows it tools, and in the form that `ToolCallReader` reads back."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "tools" in template and OPEN in template


def _plain(message: Message, template: str) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments a dictionary."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = message.text
    if message.role == "developer" and "developer" not in template:
        plain["role"] = "system"
    for call in plain.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = from_json(call["function"]["arguments"], allow_inf_nan=False)
        except ValueError:
            raise errors.invalid("tool_calls: arguments must be JSON", "messages") from None
    return plain


class PlainReader:
    """Passes text through: for requests without tools."""

    def push(self, text: str) -> tuple[str, list]:
        """Text that can be shown, and the calls that are complete, each with its number."""
        return text, []

    def finish(self) -> tuple[str, list]:
        """Return text that was kept back."""
        return "", []

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the message ended."""
        return reason


class ToolCallReader:
    """Splits a text that comes in pieces into what is said and the tools that are called."""

    def __init__(self) -> None:
        self._held = ""
        self._count = 0

    def push(self, text: str) -> tuple[str, list[tuple[int, dict]]]:
        """Text that can be shown, and the calls that are complete, each with its number."""
        text, self._held = self._held + text, ""
        said, calls = "", []
        while OPEN in text:
            before, _, rest = text.partition(OPEN)
            body, closed, after = rest.partition(CLOSE)
            said += before
            if not closed:
                self._held = OPEN + rest
                return said, calls
            if call := _call(body):
                calls.append((self._count, call))
                self._count += 1
            else:
                said += f"{OPEN}{body}{CLOSE}"
            text = after
        keep = next(n for n in range(len(OPEN) - 1, -1, -1) if text.endswith(OPEN[:n]))
        self._held = text[len(text) - keep :]
        return said + text[: len(text) - keep], calls

    def finish(self) -> tuple[str, list]:
        """Return text that was kept back for a call that was never completed."""
        held, self._held = self._held, ""
        return held, []

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the message ended: to call tools, if it does."""
        return "tool_calls" if reason == "stop" and self._count else reason


def _call(body: str) -> dict[str, Any] | None:
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": str(name), "arguments": written},
    }
