"""Parts of chat requests: messages, content parts, tools, tool choice."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ...errors import InputError
from ..request_body import FIRST_ERROR
from .body import Body


class TextPart(Body):
    """Text part of a message."""

    type: Literal["text"]
    text: str


def _only_text(content: Any) -> Any:
    """Refuse content parts that are no text, with a shorter error than pydantic's."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise InputError(f"this model reads text, not parts of type {str(kind)[:64]!r}")
    return content


class FunctionCall(Body):
    """Function name and arguments (JSON) of a call."""

    name: str
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True, description="As the openai client adds it; arguments count.")


class ToolCall(Body):
    """Tool call made by the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, exclude=True, description="As streams have it; changes nothing.")


class Message(Body):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | Annotated[list[TextPart], FIRST_ERROR] | None, BeforeValidator(_only_text)] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST_ERROR] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    parsed: Any = Field(None, exclude=True, description="As the openai client adds it; content counts.")
    annotations: Any = Field(None, exclude=True, description="As OpenAI's answers have it; changes nothing.")
    reasoning_content: str | None = Field(default=None, description="What the assistant reasoned before it answered.")

    @property
    def text(self) -> str:
        """Content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    """Function tool: name, description, parameters."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Name of a function."""

    name: str


class NamedTool(Body):
    """The one function to call (tool_choice)."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Subset of the tools that may be called, by name or definition (tool_choice: allowed_tools)."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[Tool], FIRST_ERROR, Field(min_length=1, max_length=128)]


class AllowedToolChoice(Body):
    """Restriction of the callable tools that leaves the prompt, and so its cached prefix, unchanged."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else value
    kinds = {"function": "one tool", "allowed_tools": "some tools"}
    return kinds.get(kind, "a word") if isinstance(kind, str) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[NamedTool, Tag("one tool")]
    | Annotated[AllowedToolChoice, Tag("some tools")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice_type",
        custom_error_message="must be none, auto, required, or an object of type function or allowed_tools",
    ),
]
