"""Chat: prompt by the chat template, constraint on the answer, parser of the answer.

The prompt itself is made by `tokenizer.chat`, which keeps what a user wrote from forging turns. How the model writes
tool calls and reasoning follows from its chat template (`tool_formats.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....tokenizer.chat import encode_chat
from ...serving.structured_output import TriggeredGrammar
from . import errors
from .conversation import AllowedToolChoice, Message, NamedTool, Tool
from .message_reader import PlainReader, make_reader
from .requests import ChatRequest
from .tool_formats import format_of, read_json, thoughts_of
from .tool_grammar import answer_grammar, bound_grammar, call_grammar

RESERVED = {"messages", "tools", "add_generation_prompt", "continue_last"}


def encode_conversation(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Tool] | None = None,
    variables: dict[str, Any] | None = None,
    continue_last: bool = False,
) -> list[int]:
    """Tokenize a conversation for the next message, or to continue the last one."""
    if tokenizer is None:
        raise errors.invalid("this model has no tokenizer: it cannot chat; send token ids to /v1/completions")
    variables = dict(variables or {})
    if tools:
        if format_of(tokenizer.chat_template) is None:
            message = "tools: this model's chat template has no tools, or none whose calls can be read"
            raise errors.invalid(message, "tools", "unsupported_parameter")
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    plain = [_plain(message, tokenizer.chat_template or "") for message in messages]
    return encode_chat(tokenizer, plain, continue_last, **variables)


@dataclass(frozen=True, slots=True)
class Trigger:
    """Trigger of a grammar in free text: the arguments of `TriggeredGrammar`."""

    grammar: str
    mark: str
    first_only: bool
    quiet: tuple[str, str] | None
    inside: bool
    repeated: bool

    def bind(self, make: Callable[[], Any], tokenizer: Any) -> Callable[[], TriggeredGrammar]:
        """Factory of triggered grammars from a compiled one."""
        when = (self.first_only, self.quiet, self.inside, self.repeated)
        return lambda: TriggeredGrammar(make, tokenizer, self.mark, *when)


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """Plan of a chat: prompt, constraint on the answer, parser of the answer."""

    tools: list[Tool] | None
    variables: dict[str, Any]
    grammar: dict[str, Any]
    """Constraints on the answer, as fields of `SamplingParams`."""
    reader: Callable[..., PlainReader]
    trigger: Trigger | None = None
    """Grammar of calls that the model may begin or not."""

    def encode(self, tokenizer: Any, body: ChatRequest) -> list[int]:
        """Tokenize the prompt."""
        variables = self.variables | ({} if body.add_generation_prompt else {"add_generation_prompt": False})
        return encode_conversation(tokenizer, body.messages, self.tools, variables, body.continue_final_message)


def plan_chat(tokenizer: Any, body: ChatRequest, effort: str | None = None) -> ChatPlan:
    """Decide, by the model's chat template, how tools, reasoning and answer format are handled.

    `effort` is a wish that is passed over where the template has no switch for it; the body's own is refused then.
    """
    template = getattr(tokenizer, "chat_template", None)
    tools = body.tools if body.tool_choice != "none" else None
    variables = dict(body.chat_template_kwargs or {})
    if taken := RESERVED & variables.keys():
        raise errors.invalid(f"chat_template_kwargs cannot set {min(taken)}", "chat_template_kwargs")
    if body.reasoning_effort is not None:
        variables |= _effort(template or "", body.reasoning_effort)
    if effort:
        with suppress(errors.APIError):
            variables |= _effort(template or "", effort)
    grammar, (allowed, must_call) = body.grammar(), _callable(body)
    forced = allowed if must_call else []
    if forced and grammar:
        raise errors.invalid("tool_choice and a format of the answer exclude each other: give one", "tool_choice")
    several = body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool)
    row, thoughts = format_of(template), thoughts_of(template)
    reasoning = _reasoning(tokenizer, thoughts, variables) if thoughts and not body.continue_final_message else None
    schemas = {tool.function.name: tool.function.parameters or {} for tool in allowed}
    if forced and row:
        try:
            grammar = {"grammar": call_grammar(tokenizer, row, schemas, several, reasoning)}
        except (AttributeError, TypeError, RecursionError):  # whatever was sent as a schema
            raise errors.invalid("tools: parameters must be a JSON schema", "tools") from None
    elif reasoning and isinstance(schema := grammar.get("json_schema"), dict):
        grammar = {"grammar": answer_grammar(tokenizer, schema, reasoning)}
    reader = partial(make_reader, row, schemas, thoughts, reasoning, None if several else 1)
    if forced and row:
        return ChatPlan(tools, variables, grammar, partial(reader, eager=True))
    trigger = None
    if allowed and row and not grammar and not body.min_tokens:
        with suppress(AttributeError, TypeError, RecursionError):  # a strange schema: the calls are free
            grammar_of_calls = bound_grammar(tokenizer, row, schemas)
            quiet = row.quiet or (thoughts if reasoning else None)
            inside, repeated = reasoning == "inside", row.quiet is not None
            trigger = Trigger(grammar_of_calls, row.mark, row.only_first, quiet, inside, repeated)
    return ChatPlan(tools, variables, grammar, reader, trigger)


def _callable(body: ChatRequest) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether a call is required."""
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, NamedTool):
        return _named(tools, [choice.function.name]), True
    if isinstance(choice, AllowedToolChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return _named(tools, names), choice.allowed_tools.mode == "required"
    if choice == "required" and not tools:
        raise errors.invalid("tool_choice is required, but there are no tools", "tool_choice")
    return ([] if choice == "none" else tools), choice == "required"


def _named(tools: list[Tool], names: list[str]) -> list[Tool]:
    """The tools of these names; an unknown name is refused."""
    for name in names:
        if not any(tool.function.name == name for tool in tools):
            raise errors.invalid(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
    return [tool for tool in tools if tool.function.name in names]


def _effort(template: str, effort: str) -> dict[str, Any]:
    """Template variables for the reasoning effort."""
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort != "none"}
    message = "reasoning_effort is not supported: this model's chat template has no switch for reasoning"
    raise errors.invalid(message, "reasoning_effort", "unsupported_parameter")


def _reasoning(tokenizer: Any, thoughts: tuple[str, str], variables: dict[str, Any]) -> str | None:
    """Reasoning state at the start of the answer: inside, optional, or none."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], **variables).rstrip()
    if prompt.endswith(thoughts[0].rstrip()):
        return "inside"
    return None if prompt.endswith(thoughts[1]) else "free"


def _plain(message: Message, template: str) -> dict[str, Any]:
    """Message as templates expect it: content a string, arguments a dict."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = message.text
    if message.role == "developer" and "developer" not in template:
        plain["role"] = "system"
    for call in plain.get("tool_calls", ()):
        arguments = read_json(call["function"]["arguments"] or "{}")
        if not isinstance(arguments, dict):
            raise errors.invalid("tool_calls: arguments must be a JSON object", "messages")
        if not _joins_arguments(template):
            call["function"]["arguments"] = arguments
    return plain


def _joins_arguments(template: str) -> bool:
    """Return whether the template concatenates arguments as a string (DeepSeek)."""
    return not any(word in template for word in ("tojson", "items", "mapping"))
