"""OpenAI's Responses API (`/v1/responses`), stateless, translated to and from a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ...serving import SamplingParams
from ..openai import errors
from ..openai.chat import ChatPlan
from ..openai.message_reader import Delta
from ..openai.requests import ChatRequest
from ..openai.responses import Collector, Part, usage
from ..request_body import FIRST_ERROR
from .tolerant import AgentRequest, Blocks, is_function, text_of

STATEFUL = {
    "previous_response_id": "this server keeps no conversations: send the whole one as input",
    "conversation": "this server keeps no conversations: send the whole one as input",
    "background": "this server keeps no answers: wait for it, or stream it",
}


NAMES = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


class ResponsesRequest(AgentRequest):
    """The next items of a conversation."""

    input: str | Annotated[list[dict[str, Any]], FIRST_ERROR, Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="At most.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR, Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: dict[str, Any] | None = Field(None, description="format: text, json_object or json_schema.")
    reasoning: dict[str, Any] | None = Field(None, description="effort, where the chat template has a switch for it.")
    store: bool | None = Field(None, description="Nothing is stored: true is named in x-warploom-ignored.")
    metadata: dict[str, Any] | None = None

    def chat(self) -> ChatRequest:
        """Convert to a chat."""
        for name, why in STATEFUL.items():
            if (self.model_extra or {}).get(name):
                raise errors.invalid(f"{name} is not supported: {why}", name, "unsupported_parameter")
        tools = [_tool(tool) for tool in self.tools or [] if is_function(tool)]
        body = {"messages": self._messages(), "tools": tools or None, "model": self.model, "user": self.user}
        body |= {name: getattr(self, name) for name in ("temperature", "top_p") if name in self.model_fields_set}
        body["max_tokens"] = self.max_output_tokens
        body |= {"parallel_tool_calls": self.parallel_tool_calls, "response_format": self._format()}
        choice = self.tool_choice
        body["tool_choice"] = _tool_choice(choice) if isinstance(choice, dict) else choice
        return ChatRequest.model_validate(body)

    def ignored(self) -> list[str]:
        return super().ignored() + (["store"] if self.store else [])

    @property
    def effort(self) -> str:
        return str((self.reasoning or {}).get("effort") or "")

    def _format(self) -> dict[str, Any] | None:
        given = (self.text or {}).get("format")
        if not isinstance(given, dict) or given.get("type") != "json_schema":
            return given
        return {"type": "json_schema", "json_schema": {"name": given.get("name"), "schema": given.get("schema")}}

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        for item in items:
            _add(messages, item)
        return messages


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any] | str | None:
    """A choice as chats have it; one of tools that are not functions is passed over."""
    if choice.get("type") == "function":
        return _function_name(choice)
    if choice.get("type") != "allowed_tools":
        return None
    given = choice.get("tools")
    tools = [tool for tool in given if isinstance(tool, dict)] if isinstance(given, list) else []
    named = [_function_name(tool) for tool in tools if is_function(tool)]
    if tools and not named:
        return "none"
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}


def _function_name(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": str(tool.get("name"))}}


def _add(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Add an item; consecutive reasoning, text and calls of the assistant become one message."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        text = text_of(item.get("output"), "input.output")
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": text})
        return
    if kind == "message":
        role, text = item.get("role"), text_of(item.get("content"), "input.content")
        if role != "assistant":
            messages.append({"role": role, "content": text})
            return
        last = _assistant(messages)
        last["content"] = last.get("content", "") + text
    elif kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": str(item.get("call_id")), "type": "function", "function": call}
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        last = _assistant(messages)
        last["reasoning_content"] = text_of(item.get("content"), "input.content")
    else:
        raise errors.invalid(f"input: items of type {str(kind)[:64]!r} are not supported", "input")


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": function}


class ResponsesWriter:
    """Writer of responses and events."""

    end = b""

    def __init__(self, body: ResponsesRequest, head: dict[str, Any], flow: Any, plan: ChatPlan, params: SamplingParams):
        self._flow, self._reader, self._blocks = flow, plan.reader(), Blocks()
        self._id, self._sequence, self._output = head["id"].partition("-")[2], -1, []
        tools = [tool for tool in body.tools or [] if is_function(tool)]
        self._head = {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": head["created"],
            "model": head["model"],
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "tools": tools,
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
            "metadata": body.metadata or {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "error": None,
        }

    def collector(self) -> Collector:
        """Collector of the stream's pieces."""
        return Collector()

    def whole(self) -> dict[str, Any]:
        """Complete response."""
        (stream,) = self._flow.streams
        self._happen(self._reader.read(stream.output().text), final=True)
        return self._response(stream)

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Events for one increment."""
        events = []
        if self._sequence < 0:
            begun = {**self._head, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
            events += [self._event("created", response=begun), self._event("in_progress", response=begun)]
        final = part.finish_reason is not None
        events += self._happen(self._reader.read(part.text, final), final)
        if final:
            response = self._response(self._flow.streams[0])
            events.append(self._event(response["status"], response=response))
        return events

    def error(self, error: errors.APIError) -> dict[str, Any]:
        """Error event."""
        self._sequence += 1
        given = {"code": error.code, "message": error.message, "param": error.param}
        return {"type": "error", **given, "sequence_number": self._sequence}

    def _happen(self, said: Delta, final: bool) -> list[dict[str, Any]]:
        """Events of new output and of its end; `output` grows with them."""
        made = []
        for event, kind, value in self._blocks.events(said, final):
            index = self._blocks.count
            item = self._item(kind, index, value if event != "grow" else self._blocks.value)
            at = {"output_index": index, "item_id": item["id"]}
            name = NAMES[kind]
            part = {} if kind == "call" else {"content_index": 0}
            if event == "begin":
                empty = {**item, "status": "in_progress", **({} if kind == "call" else {"content": []})}
                made.append(self._event("output_item.added", output_index=index, item=empty))
                if part:
                    made.append(self._event("content_part.added", **at, **part, part=_part(kind, "")))
            elif event == "grow":
                made.append(self._event(f"{name}.delta", **at, **part, delta=value, **_logprobs(kind)))
            elif kind == "call":
                done = {"name": item["name"], "arguments": item["arguments"]}
                made.append(self._event(f"{name}.done", **at, **done))
            else:
                made.append(self._event(f"{name}.done", **at, **part, text=value, **_logprobs(kind)))
                made.append(self._event("content_part.done", **at, **part, part=_part(kind, value)))
            if event == "end":
                made.append(self._event("output_item.done", output_index=index, item=item))
                self._output.append(item)
        return made

    def _item(self, kind: str, index: int, value: Any) -> dict[str, Any]:
        if kind == "reasoning":
            content = [_part(kind, value)]
            return {"id": f"rs_{self._id}_{index}", "type": "reasoning", "summary": [], "content": content}
        if kind == "text":
            item = {"id": f"msg_{self._id}_{index}", "type": "message", "role": "assistant", "status": "completed"}
            return {**item, "content": [_part(kind, value)]}
        item = {"id": f"fc_{self._id}_{index}", "type": "function_call", "status": "completed", "call_id": value["id"]}
        return {**item, **value["function"]}

    def _response(self, stream: Any) -> dict[str, Any]:
        counts, cut = usage(self._flow), stream.sequence.finish_reason == "length"
        told = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        why = {"reason": "max_output_tokens"} if cut else None
        status = "incomplete" if cut else "completed"
        return {**self._head, "status": status, "incomplete_details": why, "output": self._output, "usage": told}

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": f"response.{name}", "sequence_number": self._sequence, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _logprobs(kind: str) -> dict[str, list]:
    return {"logprobs": []} if kind == "text" else {}
