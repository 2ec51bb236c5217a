"""Response schemas for `/openapi.json` and `/docs`; `responses.py` builds the responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Reason = Literal["stop", "length", "tool_calls"]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Error object."""

    error: ErrorBody


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptScore(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


# By token id, the prompt's token first; none for the first token, which nothing comes before.
PromptLogprobs = list[dict[str, PromptScore] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """The continuations of the prompts, those of the first prompt first."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenScore(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    content: list[TokenScore] | None
    refusal: None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class CalledTool(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(BaseModel):
    """The assistant's next message, `n` times."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Whatever(BaseModel):
    """Answer in the shape of another protocol, whose own description is the vendor's."""

    model_config = ConfigDict(extra="allow")


class InputUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """A unit vector an input, and how hidden states were pooled for it."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: InputUsage
    pooling: Literal["mean", "last"]


class Score(BaseModel):
    object: Literal["score"]
    index: int
    score: float


class Scores(BaseModel):
    """A cosine a pair."""

    id: str
    object: Literal["list"]
    created: int
    data: list[Score]
    model: str
    usage: InputUsage
    pooling: Literal["mean", "last"]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Generated(BaseModel):
    """Each row's prompt and continuation as token ids; the continuation's text; why it ended."""

    idx: list[list[int]]
    text: list[str]
    finish_reason: list[str]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str]


class Detokenized(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str


class Health(BaseModel):
    """ "ok", or why requests are not served."""

    status: str


# An event of a stream: its data is an object in JSON, or [DONE] at the end.
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


def answers(model: type[BaseModel], *statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its schema, and the error statuses."""
    described: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in (*statuses, 401)}
    described[200] = {"model": model}
    if stream:
        described[200]["content"] = {"text/event-stream": {"schema": EVENT}}
    return described
