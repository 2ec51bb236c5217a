"""Response bodies: choices, log-probabilities, usage, stream chunks.

Plain dictionaries in OpenAI's shapes: a token is answered thousands of times a second, and a model class a token would
cost more than the token. `schemas.py` says the same shapes for `/openapi.json`, and the tests hold the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from statistics import fmean
from typing import Any

from ...serving import Piece, SamplingParams
from ..request_stream import Event, RequestStream

SLICE = 1 << 14  # elements of a list that are written in one call
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make one each time


def to_json(value: Any) -> bytes:
    """Compact JSON, without ASCII escapes."""
    return _encode(value).encode()


def to_json_in_parts(value: Any, levels: int = 5) -> bytes:
    """JSON with one encoder call for each part `levels` down: one call of 40 MB would hold the GIL too long.

    Five levels lead to the entries of log-probabilities; a long list is written in slices wherever it stands.
    """
    return _in_parts(value, levels).encode()


def _in_parts(value: Any, levels: int) -> str:
    if levels and isinstance(value, dict):
        return f"{{{','.join([f'{_encode(name)}:{_in_parts(each, levels - 1)}' for name, each in value.items()])}}}"
    if levels and isinstance(value, (list, map)):
        return f"[{','.join([_in_parts(each, levels - 1) for each in value])}]"
    if isinstance(value, list) and len(value) > SLICE:
        slices = (value[start : start + SLICE] for start in range(0, len(value), SLICE))
        return f"[{','.join([_encode(each)[1:-1] for each in slices])}]"
    return _encode(value)


def server_sent(value: dict[str, Any], encode: Callable[[Any], bytes] = to_json) -> bytes:
    """Server-sent event, named if it has a type."""
    name = f"event: {value['type']}\n".encode() if "type" in value else b""
    return name + b"data: " + encode(value) + b"\n\n"


END_OF_STREAM = b"data: [DONE]\n\n"


class Words:
    """Texts of tokens as clients see them in log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(1 << 16)(self._text)

    def bytes(self, token: int) -> bytes:
        """Bytes of a token; empty for embedding rows without a token."""
        try:
            return self._tokenizer.token_bytes(token) if self._tokenizer else b""
        except ValueError:
            return b""

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:  # a part of a character; OpenAI writes those as escaped bytes
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def stream(self) -> Any:
        """Streaming decoder, if there is a tokenizer."""
        return self._tokenizer and self._tokenizer.stream()


@dataclass(slots=True)
class Part:
    """Increment of one continuation: text, tokens, and whether it has ended."""

    text: str = ""
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Merge the next piece."""
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason


class Collector:
    """Merges the pieces of a batch into one increment a continuation; holds back those with nothing to show.

    A token that ends in the middle of a character, or in what may become a stop string, has no text yet: its
    log-probability waits for the text it belongs to, so that no empty chunk is ever sent. With `wait_for_tokens`, so
    does an echoed prompt, whose log-probabilities are known when the first token is.
    """

    def __init__(self, wait_for_tokens: bool = False) -> None:
        self._parts: dict[int, Part] = {}
        self._waiting = wait_for_tokens
        self._started: set[int] = set()

    def collect(self, events: Sequence[Event]) -> list[tuple[int, Part]]:
        """Increments that can be sent now."""
        touched = dict.fromkeys(event.index for event in events)
        for index, piece, _ in events:
            self._parts.setdefault(index, Part()).add(piece)
            if piece.token_ids or piece.finish_reason:
                self._started.add(index)
        return [(index, self._parts.pop(index)) for index in touched if self._ready(index)]

    def _ready(self, index: int) -> bool:
        part = self._parts[index]
        return bool(part.finish_reason or (part.text and (not self._waiting or index in self._started)))


def usage(flow: RequestStream) -> dict[str, Any]:
    """Token counts of a finished request."""
    metrics = [stream.metrics for stream in flow.streams]
    completion = sum(each.generated_tokens for each in metrics)
    cached = sum(generation.streams[0].metrics.cached_tokens for generation in flow.generations)
    return {
        "prompt_tokens": flow.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": flow.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def count_scores(params: SamplingParams, prompt: int, generated: int) -> int:
    """Number of log-probabilities in a response, alternatives included.

    Each of a prompt's continuations is told with all of the prompt's."""
    echoed = 0 if params.prompt_logprobs is None else params.n * prompt * (1 + params.prompt_logprobs)
    return echoed + (0 if params.logprobs is None else generated * (1 + params.logprobs))


def prompt_scores(words: Words, leader: Any, top: int) -> list[dict[str, dict[str, Any]] | None]:
    """A prompt's log-probabilities as vLLM tells them: of each token and of the `top` most likely, by token id."""
    return [None, *(_ranked(words, entry, top) for entry in leader.prompt_logprobs)]


def _ranked(words: Words, entry: Any, top: int) -> dict[str, dict[str, Any]]:
    best = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:top], 1)]
    told: dict[str, dict[str, Any]] = {}
    for token, logprob, rank in ((entry.token, entry.logprob, entry.rank), *best):
        told.setdefault(str(token), {"logprob": logprob, "rank": rank, "decoded_token": words.text(token)})
    return told


# -- completions ------------------------------------------------------------------------------------------------------


class CompletionScores:
    """`logprobs` in the format of completions: parallel lists with text offsets."""

    def __init__(self, words: Words, top: int, hidden: frozenset[int]) -> None:
        self._words, self._top, self._hidden = words, top, hidden
        self._decoder = words.stream()
        self._length = 0

    def echoed(self, tokens: Sequence[int], logprobs: Sequence) -> dict[str, list]:
        """Those of an echoed prompt, whose first token has none."""
        return {
            "tokens": [self._words.text(token) for token in tokens],
            "token_logprobs": [None, *(entry.logprob for entry in logprobs)],
            "top_logprobs": [None, *map(self._best, logprobs)],
            "text_offset": [self._offset(token) for token in tokens],
        }

    def generated(self, logprobs: Sequence) -> dict[str, list]:
        """Those of generated tokens."""
        return {
            "tokens": [self._words.text(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [*map(self._best, logprobs)],
            "text_offset": [self._offset(entry.token, self._hidden) for entry in logprobs],
        }

    def _best(self, entry: Any) -> dict[str, float]:
        best: dict[str, float] = {}
        for token, logprob in (*entry.top[: self._top], (entry.token, entry.logprob)):
            best.setdefault(self._words.text(token), logprob)
        return best

    def _offset(self, token: int, hidden: frozenset[int] = frozenset()) -> int:
        offset = self._length
        if self._decoder is not None and token not in hidden and self._words.bytes(token):
            self._length += len(self._decoder.push(token))
        return offset


def most_likely(streams: Sequence, n: int) -> list:
    """The `n` continuations of the highest mean log-probability a token; in their order where all are wanted."""

    def mean(stream: Any) -> float:
        return fmean(entry.logprob for entry in stream.logprobs) if stream.logprobs else 0.0

    return sorted(streams, key=mean, reverse=True)[:n] if n < len(streams) else list(streams)


class CompletionWriter:
    """Writer of completion responses and chunks."""

    end, error = END_OF_STREAM, staticmethod(attrgetter("body"))

    def __init__(
        self,
        head: dict[str, Any],
        flow: RequestStream,
        words: Words,
        hidden: frozenset[int],
        n: int,
        top: int | None,
        prompt_top: int | None,
    ) -> None:
        self._head, self._flow, self._words = {**head, "object": "text_completion"}, flow, words
        self._n, self._prompt_top = n, prompt_top
        self.counts_usage = "usage" in head
        streams = flow.streams
        self._scores = [None if top is None else CompletionScores(words, top, hidden) for _ in streams]
        self._first = [generation.streams[0] for generation in flow.generations for _ in range(n)]
        self._echoing = top is not None and any(stream.sequence.params.echo for stream in streams)
        self._unsaid_echo = set(range(len(streams))) if self._echoing else set()

    def collector(self) -> Collector:
        """Collector of the stream's pieces."""
        return Collector(wait_for_tokens=self._echoing)

    def whole(self) -> dict[str, Any]:
        """Complete response."""
        told = [stream for generation in self._flow.generations for stream in most_likely(generation.streams, self._n)]
        choices = map(self._whole_choice, *zip(*enumerate(told)))  # made one by one, as they are written
        return {**self._head, "choices": choices, "usage": usage(self._flow)}

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Chunk for one increment."""
        return [{**self._head, "choices": [self._choice(index, part)]}]

    def last(self) -> dict[str, Any]:
        """Usage chunk that ends a stream."""
        return {**self._head, "choices": [], "usage": usage(self._flow)}

    def _whole_choice(self, index: int, stream: Any) -> dict[str, Any]:
        choice = self._choice(index, Part(stream.output().text, stream.logprobs, stream.sequence.finish_reason))
        if self._prompt_top is not None:
            choice["prompt_logprobs"] = prompt_scores(self._words, self._first[index], self._prompt_top)
        return choice

    def _choice(self, index: int, part: Part) -> dict[str, Any]:
        scores = self._logprobs(index, part)
        return {"index": index, "text": part.text, "logprobs": scores, "finish_reason": part.finish_reason}

    def _logprobs(self, index: int, part: Part) -> dict[str, list] | None:
        scores = self._scores[index]
        if scores is None:
            return None
        echoed: dict[str, list] = {}
        if index in self._unsaid_echo:
            self._unsaid_echo.discard(index)
            leader = self._first[index]
            prompt = leader.sequence.tokens[: leader.sequence.prompt_length]
            echoed = scores.echoed(prompt, leader.prompt_logprobs)
        return {name: echoed.get(name, []) + new for name, new in scores.generated(part.logprobs).items()}


# -- chat -------------------------------------------------------------------------------------------------------------


class ChatWriter:
    """Writer of chat responses and chunks."""

    end, error = END_OF_STREAM, staticmethod(attrgetter("body"))

    def __init__(
        self,
        head: dict[str, Any],
        flow: RequestStream,
        words: Words,
        top: int | None,
        prompt_top: int | None,
        reader: Callable[[], Any],
    ) -> None:
        self._head, self._flow, self._words = head, flow, words
        self._top, self._prompt_top = top, prompt_top
        self.counts_usage = "usage" in head
        self._readers = [reader() for _ in range(flow.count)]
        self._greeted: set[int] = set()

    def collector(self) -> Collector:
        """Collector of the stream's pieces."""
        return Collector()

    def whole(self) -> dict[str, Any]:
        """Complete response."""
        choices = map(self._message, *zip(*enumerate(self._flow.streams)))
        whole = {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(self._flow)}
        if self._prompt_top is not None:
            whole["prompt_logprobs"] = prompt_scores(self._words, self._flow.streams[0], self._prompt_top)
        return whole

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Chunk for one increment, if it has something to show."""
        reader = self._readers[index]
        said = reader.read(part.text, part.finish_reason is not None)
        if not (said or part.finish_reason or part.logprobs):
            return []
        delta: dict[str, Any] = {} if index in self._greeted else {"role": "assistant"}
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.content or (delta and not said):
            delta["content"] = said.content
        if said.calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in said.calls]
        self._greeted.add(index)
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(part.logprobs)}
        choice["finish_reason"] = reader.finish_reason(part.finish_reason)
        return [{**self._head, "object": "chat.completion.chunk", "choices": [choice]}]

    def last(self) -> dict[str, Any]:
        """Usage chunk that ends a stream."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(self._flow)}

    def _message(self, index: int, stream: Any) -> dict[str, Any]:
        reader = self._readers[index]
        said = reader.read(stream.output().text)
        content = said.content if said.content or not said.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = said.whole_calls()
        reason = reader.finish_reason(stream.sequence.finish_reason)
        logprobs = self._logprobs(stream.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, entries: Sequence) -> dict[str, Any] | None:
        if self._top is None:
            return None
        content = [
            {
                **self._word(entry.token, entry.logprob),
                "top_logprobs": [self._word(*each) for each in entry.top[: self._top]],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _word(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._words.text(token), self._words.bytes(token)
        return {"token": text, "logprob": logprob, "bytes": [*data]}
