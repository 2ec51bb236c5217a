"""Anthropic's Messages API (`/v1/messages`), translated to and from a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ...serving import SamplingParams
from ..openai import errors
from ..openai.chat import ChatPlan
from ..openai.message_reader import as_call
from ..openai.requests import ChatRequest, Stop
from ..openai.responses import Collector, Part, usage
from ..openai.tool_formats import read_json
from ..request_body import FIRST_ERROR
from .tolerant import AgentRequest, Blocks, Tolerant, is_function, text_of

DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Turn(Tolerant):
    """Message: a text, or content blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[dict[str, Any]], FIRST_ERROR]


class ToolChoice(Tolerant):
    """Anthropic's tool_choice."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessagesRequest(AgentRequest):
    """The next message of a conversation."""

    messages: Annotated[list[Turn], FIRST_ERROR, Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="At most; default: what the context holds.")
    system: str | Annotated[list[dict[str, Any]], FIRST_ERROR] | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    stop_sequences: Annotated[list[Stop], FIRST_ERROR, Field(max_length=16)] | None = None
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR, Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None

    thinking: dict[str, Any] | None = Field(None, description="enabled or disabled, where the template has a switch.")
    output_config: dict[str, Any] | None = Field(None, description="format: a json_schema; effort, as thinking.")

    @property
    def effort(self) -> str:
        named = {"enabled": "high", "disabled": "none"}.get((self.thinking or {}).get("type", ""), "")
        return named or str((self.output_config or {}).get("effort") or "")

    def chat(self) -> ChatRequest:
        """Convert to a chat."""
        messages = [{"role": "system", "content": text_of(self.system, "system")}] if self.system else []
        for turn in self.messages:
            messages += _assistant(turn) if turn.role == "assistant" else _user(turn)
        tools = [_tool(tool) for tool in self.tools or [] if is_function(tool)]
        body = {"messages": messages, "tools": tools or None, "max_tokens": self.max_tokens, "model": self.model}
        body |= {
            name: getattr(self, name) for name in ("temperature", "top_p", "top_k") if name in self.model_fields_set
        }
        body |= {"stop": self.stop_sequences, "user": self.user}
        if self.tool_choice is not None:
            choice = self.tool_choice
            named = {"type": "function", "function": {"name": choice.name or ""}}
            body["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
            body["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        body["response_format"] = (self.output_config or {}).get("format")
        body["continue_final_message"] = self.messages[-1].role == "assistant"
        return ChatRequest.model_validate(body)


def _user(turn: Turn) -> list[dict[str, Any]]:
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results, texts = [], []
    for block in turn.content:
        if block.get("type") == "tool_result":
            text = text_of(block.get("content"), "messages.content")
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": text})
        else:
            texts.append(block)
    return [*results, *([{"role": turn.role, "content": text_of(texts, "messages.content")}] if texts else [])]


def _assistant(turn: Turn) -> list[dict[str, Any]]:
    if isinstance(turn.content, str):
        return [{"role": "assistant", "content": turn.content}]
    texts, calls, thoughts = [], [], []
    for block in turn.content:
        if block.get("type") == "tool_use":
            calls.append(_call(block))
        elif block.get("type") in ("thinking", "redacted_thinking"):
            thoughts.append(str(block.get("thinking", "")))
        else:
            texts.append(block)
    message = {"role": "assistant", "content": text_of(texts, "messages.content")}
    message |= {"tool_calls": calls or None, "reasoning_content": "".join(thoughts) or None}
    return [message]


def _call(block: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
        raise errors.invalid("messages.content: a tool_use needs a name and an input, which is an object", "messages")
    return {**as_call(block["name"], block["input"]), "id": str(block.get("id"))}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    schema = tool.get("input_schema", tool.get("parameters"))
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": schema}
    return {"type": "function", "function": function}


class MessagesWriter:
    """Writer of responses and events."""

    end = b""

    def __init__(
        self, body: MessagesRequest, head: dict[str, Any], flow: Any, plan: ChatPlan, params: SamplingParams
    ) -> None:
        self._flow, self._reader, self._blocks = flow, plan.reader(), Blocks()
        self._head = {
            "id": f"msg_{head['id'].partition('-')[2]}",
            "type": "message",
            "role": "assistant",
            "model": head["model"],
        }
        self._started = False

    def collector(self) -> Collector:
        """Collector of the stream's pieces."""
        return Collector()

    def whole(self) -> dict[str, Any]:
        """Complete response."""
        (stream,) = self._flow.streams
        events = self._blocks.events(self._reader.read(stream.output().text), final=True)
        content = [_block(kind, value) for event, kind, value in events if event == "end"]
        return {**self._head, "content": content, **self._stop(stream), "usage": self._usage()}

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Events for one increment."""
        final = part.finish_reason is not None
        events = [] if self._started else [self._start()]
        for event, kind, value in self._blocks.events(self._reader.read(part.text, final), final):
            events.append(self._event(event, kind, value))
        if final:
            (stream,) = self._flow.streams
            events.append({"type": "message_delta", "delta": self._stop(stream), "usage": self._usage()})
            events.append({"type": "message_stop"})
        return events

    def error(self, error: errors.APIError) -> dict[str, Any]:
        """Error event."""
        return {"type": "error", **error.body}

    def _start(self) -> dict[str, Any]:
        self._started = True
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
        return {"type": "message_start", "message": {**message, "usage": self._usage()}}

    def _event(self, event: str, kind: str, value: Any) -> dict[str, Any]:
        at = {"index": self._blocks.count}
        if event == "begin":
            return {"type": "content_block_start", **at, "content_block": _block(kind, value)}
        if event == "end":
            return {"type": "content_block_stop", **at}
        name, field = DELTAS[kind]
        return {"type": "content_block_delta", **at, "delta": {"type": name, field: value}}

    def _stop(self, stream: Any) -> dict[str, Any]:
        reason = self._reader.finish_reason(stream.sequence.finish_reason)
        if reason == "stop" and stream.stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stream.stop_string}
        return {"stop_reason": REASONS.get(reason or "", reason), "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        counts = usage(self._flow)
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        both = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}
        return {"input_tokens": counts["prompt_tokens"] - cached, "output_tokens": counts["completion_tokens"], **both}


def _block(kind: str, value: Any) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "thinking", "thinking": value, "signature": ""}
    if kind == "text":
        return {"type": "text", "text": value}
    name, arguments = value["function"]["name"], read_json(value["function"]["arguments"])
    return {"type": "tool_use", "id": value["id"], "name": name, "input": arguments or {}}  # none: cut by max_tokens
