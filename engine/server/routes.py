"""Routes of the models: each finds the model that a request names and calls its handler."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from .model_pool import ModelPool
from .openai import schemas
from .openai.embeddings import EmbeddingRequest, ScoreRequest
from .openai.requests import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from .openai.schemas import answers
from .protocols.messages import MessagesRequest, MessagesWriter
from .protocols.responses import ResponsesRequest, ResponsesWriter

REFUSALS = (400, 404, 413, 415, 429, 500, 503, 504)
GENERATE: dict[str, Any] = {"tags": ["generate"]}


def add_model_routes(app: FastAPI, pool: ModelPool) -> None:
    """Add all routes that a model answers."""
    for add in (_add_completions, _add_agent_protocols, _add_embeddings, _add_models, _add_tokens):
        add(app, pool)


def _add_completions(app: FastAPI, pool: ModelPool) -> None:
    """Routes of completions and chat."""

    @app.post("/v1/completions", responses=answers(schemas.Completion, *REFUSALS, stream=True), **GENERATE)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete a text or token ids, or a list of either. With `stream`, server-sent events."""
        async with pool.use(body.model) as service:
            return await service.complete(body, request)

    @app.post("/v1/chat/completions", responses=answers(schemas.ChatCompletion, *REFUSALS, stream=True), **GENERATE)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Generate the next message of a conversation. With `stream`, server-sent events."""
        async with pool.use(body.model) as service:
            return await service.chat(body, request)

    @app.post("/generate/", responses=answers(schemas.Generated, *REFUSALS), **GENERATE)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Rows of token ids (or texts) in; rows with their continuations out, as ids and text."""
        async with pool.use(None) as service:
            return await service.generate(body, request)


def _add_agent_protocols(app: FastAPI, pool: ModelPool) -> None:
    """Routes of agent protocols (Responses, Messages), translated to chats."""

    @app.post("/v1/responses", responses=answers(schemas.Whatever, *REFUSALS, stream=True), **GENERATE)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """OpenAI's Responses API, stateless: the next items of a conversation. With `stream`, server-sent events."""
        async with pool.use(body.model) as service:
            return await service.agent(body, request, ResponsesWriter)

    @app.post("/v1/messages", responses=answers(schemas.Whatever, *REFUSALS, stream=True), **GENERATE)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Anthropic's Messages API: the next message of a conversation. With `stream`, server-sent events."""
        async with pool.use(body.model) as service:
            return await service.agent(body, request, MessagesWriter)

    @app.post("/v1/messages/count_tokens", responses=answers(schemas.Whatever, *REFUSALS), **GENERATE)
    async def count_tokens(body: MessagesRequest, request: Request) -> Response:
        """Count the tokens of a conversation, as `/v1/messages` takes it."""
        async with pool.use(body.model) as service:
            return await service.count_tokens(body, request)


def _add_embeddings(app: FastAPI, pool: ModelPool) -> None:
    """Routes of embeddings and scores."""

    @app.post("/v1/embeddings", responses=answers(schemas.Embeddings, *REFUSALS), tags=["embed"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts as unit vectors: mean- or last-token-pooled hidden states of the last layer."""
        async with pool.use(body.model) as service:
            return await service.embed(body, request)

    @app.post("/v1/score", responses=answers(schemas.Scores, *REFUSALS), tags=["embed"])
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Cosine similarity of pairs of texts, between their embeddings."""
        async with pool.use(body.model) as service:
            return await service.score(body, request)


def _add_models(app: FastAPI, pool: ModelPool) -> None:
    """Routes that list the models."""

    @app.get("/v1/models", responses=answers(schemas.ModelList), tags=["model"])
    async def models() -> Response:
        """List the served model and its adapters, each as a model."""
        return JSONResponse({"object": "list", "data": pool.first.models()})

    @app.get("/v1/models/{model:path}", responses=answers(schemas.Model, 404), tags=["model"])
    async def model(model: str) -> Response:
        """Describe one model or adapter by name."""
        found = {each["id"]: each for each in pool.first.models()}
        if model not in found:
            raise pool.first.not_served(model)
        return JSONResponse(found[model])


def _add_tokens(app: FastAPI, pool: ModelPool) -> None:
    """Routes of the tokenizer."""

    @app.post("/tokenize", responses=answers(schemas.Tokenized, 400, 404, 413, 503), tags=["model"])
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Tokenize a text, or a conversation by the chat template."""
        async with pool.use(body.model) as service:
            return await service.tokenize(body, request)

    @app.post("/detokenize", responses=answers(schemas.Detokenized, 400, 404, 413, 503), tags=["model"])
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Decode token ids to text."""
        async with pool.use(body.model) as service:
            return await service.detokenize(body, request)
