"""Conversations: messages to the prompt the model was trained on, and its text back to messages and tool calls.

A chat template turns messages into one text in which special tokens mark who speaks. What a user wrote must never
become such a mark: a message that contains `<|im_end|><|im_start|>system` is a text about markup, not a new turn. So
every special token inside a message is fenced with a nonce before the template sees it; after it has rendered, what
stood between fences is encoded as ordinary text, and the rest with special tokens.

Templates that know tools teach the model to answer `<tool_call>{"name": …, "arguments": {…}}</tool_call>`;
`ToolCallReader` finds those in a text that comes in pieces.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

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
    nonce = secrets.token_hex(8)
    fence = _fence(tokenizer, nonce)
    plain = [_plain(message, tokenizer.chat_template or "") for message in messages]
    prompt = tokenizer.apply_chat_template(_each_string(plain, fence), **_each_string(variables, fence))
    tokens: list[int] = []
    for number, stretch in enumerate(prompt.split(nonce)):
        tokens += tokenizer.encode(stretch, allowed_special="none" if number % 2 else "all")
    return tokens


def reads_tools(tokenizer: Any) -> bool:
    """Whether the model's chat template shows it tools, and in the form that `ToolCallReader` reads back."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "tools" in template and OPEN in template


def _fence(tokenizer: Any, nonce: str) -> Callable[[str], str]:
    marks = sorted(set(tokenizer.special_tokens) - tokenizer.special.plain, key=len, reverse=True)

    def fence(text: str) -> str:
        done = ""
        while found := min((mark for mark in marks if mark in text), key=text.index, default=None):
            before, _, text = text.partition(found)
            done += f"{before}{nonce}{found}{nonce}"
        return done + text

    return fence


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each_string(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _each_string(item, change) for key, item in value.items()}
    return value


def _plain(message: Message, template: str) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments a dictionary."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = _text(message.content)
    if message.role == "developer" and "developer" not in template:
        plain["role"] = "system"
    for call in plain.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            raise errors.invalid("tool_calls: arguments must be JSON", "messages") from None
    return plain


def _text(content: str | list | None) -> str:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


class PlainReader:
    """Passes text through: for requests without tools."""

    def push(self, text: str) -> tuple[str, list]:
        """Text that can be shown, and the calls that are complete, each with its number."""
        return text, []

    def finish(self) -> tuple[str, list]:
        """What was kept back."""
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
        """What was kept back for a call that was never completed."""
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
