"""Embeddings and scores: pooled hidden states of the last layer, and their cosine similarity.

A language model is no embedding model: what its hidden states are good for depends on the model, so the answer says how
they were pooled. They are of length 1, so that their product is the cosine of the angle between them.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import Request
from pydantic import Field

from ...serving import SamplingParams
from ..request_body import FIRST_ERROR, client_of
from . import errors
from .body import Body
from .requests import Prompt, Text, listed
from .responses import to_json_in_parts

if TYPE_CHECKING:
    from ..handlers import Service

MOST_INPUTS = 2048  # OpenAI's
WAVE = 64  # inputs of a request that are under way at once
NOTHING = SamplingParams(max_tokens=0)


class PoolingRequest(Body):
    """Fields common to embeddings and scores."""

    model: str | None = Field(None, description="The served model's name, or nothing.")
    pooling: Literal["mean", "last"] = Field("mean", description="Of the last layer's states: their mean, or the last.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Keep only so many of a text's last tokens; -1: what the context has room for."
    )
    user: str | None = Field(None, description="Written to the access log; changes nothing else.")


class EmbeddingRequest(PoolingRequest):
    """Texts or token ids to embed."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: float32, little-endian.")
    dimensions: int | None = Field(None, ge=1, description="Only as many as there are: nothing is cut off.")


Side = Text | Annotated[list[Text], FIRST_ERROR, Field(min_length=1, max_length=MOST_INPUTS)]


class ScoreRequest(PoolingRequest):
    """Pairs of texts: one and many, or as many on each side."""

    text_1: Side
    text_2: Side


async def embed(service: Service, body: EmbeddingRequest, request: Request) -> tuple[Callable[[], bytes], int]:
    """/v1/embeddings: writer of the response, and how many numbers it holds."""
    vectors, tokens = await _vectors(service, body, listed(body.input), request)
    rest = _rest(service, body, tokens)

    def datum(index: int, vector: np.ndarray) -> dict[str, Any]:
        return {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}

    def write() -> bytes:
        data = map(datum, *zip(*enumerate(vectors)))
        return to_json_in_parts({"object": "list", "data": data, **rest}, levels=3)

    return write, sum(map(len, vectors))


async def score(service: Service, body: ScoreRequest, request: Request) -> dict[str, Any]:
    """/v1/score."""
    left, right = ([side] if isinstance(side, str) else side for side in (body.text_1, body.text_2))
    if len(left) != len(right) and 1 not in (len(left), len(right)):
        message = f"text_1 has {len(left)} texts and text_2 {len(right)}: give as many, or one on a side"
        raise errors.invalid(message, "text_2")
    texts: list[str | list[int]] = [*dict.fromkeys([*left, *right])]
    vectors, tokens = await _vectors(service, body, texts, request)
    of = dict(zip(map(str, texts), vectors))
    pairs = max(len(left), len(right))
    sides = (side * pairs if len(side) == 1 else side for side in (left, right))
    data = [
        {"object": "score", "index": index, "score": float(of[one] @ of[other])}
        for index, (one, other) in enumerate(zip(*sides))
    ]
    head = {"id": f"score-{request.scope['visit'].id}", "object": "list", "created": int(time.time())}
    return {**head, "data": data, **_rest(service, body, tokens)}


async def _vectors(
    service: Service, body: PoolingRequest, inputs: list[str | list[int]], request: Request
) -> tuple[list[np.ndarray], int]:
    """Unit vectors of texts, and their token count."""
    if len(inputs) > MOST_INPUTS:
        raise errors.invalid(f"{len(inputs)} inputs in one request; at most {MOST_INPUTS}", "input")
    size, wanted = service.llm.config.d_model, getattr(body, "dimensions", None)
    if wanted not in (None, size):
        message = f"dimensions is {wanted}; this model's embeddings have {size}, of which nothing can be cut off"
        raise errors.invalid(message, "dimensions")
    wave, vectors, tokens = min(WAVE, max(service.bridge.capacity // 3, 1)), [], 0
    end = time.monotonic() + service.config.request_timeout
    for start in range(0, len(inputs), wave):
        if time.monotonic() > end:
            raise errors.too_slow(service.config.request_timeout)
        part = inputs[start : start + wave]
        flow = await service.bridge.submit(
            lambda llm, part=part: _asks(service, llm, part, body.truncate_prompt_tokens),
            len(part),
            pooling=body.pooling,
            adapter=service.adapter_of(body.model),
            client=client_of(request.scope),
            party=request.scope.get("party"),
            receive=request.receive,
        )
        try:
            await flow.outputs()
            vectors += [_unit(stream.pooled) for stream in flow.streams]
        finally:
            service.close(request, flow)
        tokens += flow.prompt_tokens
    request.scope["visit"].record["prompt_tokens"] = tokens
    return vectors, tokens


def _asks(service: Service, llm: Any, inputs: list, truncate: int | None) -> Iterable[tuple[list[int], SamplingParams]]:
    for each in inputs:
        yield service.tokens_of(llm, each, NOTHING, truncate), NOTHING


def _unit(vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    if not 0 < length < float("inf"):
        raise errors.failed()
    return (vector / length).astype("<f4")


def _written(vector: np.ndarray, encoding: str) -> list[float] | str:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()


def _rest(service: Service, body: PoolingRequest, tokens: int) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"model": body.model or service.config.name, "usage": usage, "pooling": body.pooling}
