"""Prompt limits: refusal before tokenizing, truncation, response size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..serving import SamplingParams
from .async_engine import Ask
from .openai import errors
from .openai.responses import count_scores

MOST_SCORES = 1 << 20  # log-probabilities in one answer: some 100 MB while it is made


def bounded(asks: Callable[[Any], Iterable[Ask]], llm: Any) -> Iterable[Ask]:
    """Yield prompts as long as the response can hold the requested log-probabilities."""
    scores = 0
    for tokens, params in asks(llm):
        scores += count_scores(params, len(tokens), params.n * (params.max_tokens or 0))
        if scores > MOST_SCORES:
            message = f"logprobs: {scores} log-probabilities were asked for; at most {MOST_SCORES} are told at once"
            raise errors.invalid(message, "logprobs")
        yield tokens, params


def truncated(llm: Any, tokens: list[int], params: SamplingParams, most: int | None) -> list[int]:
    """The last `most` tokens of a prompt (-1: what the context has room for; None: all)."""
    if most is None:
        return tokens
    if most < 0:
        most = max(llm.max_seq_len - max(params.max_tokens or 1, 1), 1)
    if most == 0:
        raise errors.invalid("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens")
    return tokens[-most:]


def refuse_long(llm: Any, text: str | list[int]) -> None:
    """Refuse a text far longer than the context from its beginning: tokenizing 4 MB takes a second.

    English has four or five characters a token; a sixteenth of the longest beginning decides only where it alone has
    twice the tokens of the context, so that where it was cut does not matter.
    """
    most, context = 16 * llm.max_seq_len, llm.max_seq_len
    if isinstance(text, str) and len(text) > most and len(llm.encode(text[:most])) > 2 * context:
        message = f"the prompt has far more tokens than the model's context, which holds {context}"
        raise errors.invalid(message, "prompt", "context_length_exceeded")
