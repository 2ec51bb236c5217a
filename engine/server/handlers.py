"""Request handlers: check a request against the model, submit it, respond whole or streaming."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..serving import SamplingParams
from ..serving.sampling_params import GRAMMARS
from .async_engine import Ask, AsyncEngine
from .config import ServerConfig
from .event_stream import EventStream
from .metrics import Metrics
from .middleware import LOGGED
from .model_defaults import sampling_defaults
from .openai import embeddings, errors
from .openai.chat import ChatPlan, Trigger, encode_conversation, plan_chat
from .openai.embeddings import EmbeddingRequest, ScoreRequest
from .openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    Sampling,
    TokenizeRequest,
)
from .openai.responses import (
    ChatWriter,
    CompletionWriter,
    Words,
    count_scores,
    server_sent,
    to_json,
    to_json_in_parts,
)
from .prompt_limits import MOST_SCORES, bounded, refuse_long, truncated
from .protocols.messages import MessagesWriter
from .protocols.responses import ResponsesWriter
from .protocols.tolerant import AgentRequest, as_chat
from .request_body import client_of
from .request_stream import RequestStream

Writer = ChatWriter | CompletionWriter | MessagesWriter | ResponsesWriter
DEFAULT_COMPLETION = 16  # OpenAI's
DEFAULT_GENERATION = 100
NO_GRAMMAR = dict.fromkeys(GRAMMARS)
INLINE = 1 << 12  # numbers of an answer that are written on the event loop: some 6 ms
LAST_EVENTS = 5.0  # seconds beyond a request's time for a client to read the event that says so


class Service:
    """Handlers of all model routes."""

    def __init__(self, bridge: AsyncEngine, config: ServerConfig, metrics: Metrics) -> None:
        self.bridge, self.config, self.metrics = bridge, config, metrics
        self.started = int(time.time())
        self.further: tuple[str, ...] = ()  # names of models that are loaded when they are asked for

    @property
    def llm(self) -> Any:
        """The engine's `LLM`; 503 while there is none."""
        if not self.bridge.engine_ready:
            raise errors.unavailable(self.bridge.state)
        return self.bridge.llm

    @cached_property
    def words(self) -> Words:
        """Texts of the model's tokens, for log-probabilities."""
        return Words(self.llm.tokenizer)

    @property
    def defaults(self) -> dict[str, Any]:
        """Recommended sampling parameters of the model (generation_config.json), unless disabled."""
        return sampling_defaults(self.llm) if self.config.model_defaults else {}

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """/v1/completions."""
        body = body.with_defaults(self.defaults)
        params, words = body.sampling(), self.words
        hidden = self.llm.engine.eos.union(params.stop_token_ids)
        default = DEFAULT_COMPLETION if body.limit is None else None
        asks = self._continuing(body.prompts, params, default, body.truncate_prompt_tokens)
        flow = await self._submit(request, asks, len(body.prompts) * params.n, params, body, body.stream)
        head, tops = self._head("cmpl", body, request), (body.logprobs, body.prompt_logprobs)
        writer = CompletionWriter(head, flow, words, hidden, body.n, *tops)
        return await self._answer(request, body.stream, flow, writer, params)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """/v1/chat/completions."""
        words = self.words
        flow, plan, params = await self._converse(body, request, body.stream)
        tops = params.logprobs, params.prompt_logprobs
        writer = ChatWriter(self._head("chatcmpl", body, request), flow, words, *tops, plan.reader)
        return await self._answer(request, body.stream, flow, writer, params)

    async def agent(self, body: AgentRequest, request: Request, writer: Callable[..., Writer]) -> Response:
        """/v1/responses and /v1/messages: translated to a chat."""
        chat = as_chat(body)
        flow, plan, params = await self._converse(chat, request, body.stream, body.effort)
        made = writer(body, self._head("", body, request), flow, plan, params)
        return await self._answer(request, body.stream, flow, made, params)

    async def count_tokens(self, body: AgentRequest, request: Request) -> Response:
        """/v1/messages/count_tokens."""
        chat = as_chat(body)
        self.adapter_of(chat.model)

        def count(llm: Any) -> int:
            plan = plan_chat(llm.tokenizer, chat, body.effort)
            return len(plan.encode(llm.tokenizer, chat))

        tokens = await self.bridge.offload(count, self.llm, client=client_of(request.scope))
        return json_response({"input_tokens": tokens})

    async def _converse(
        self, body: ChatRequest, request: Request, stream: bool, effort: str | None = None
    ) -> tuple[RequestStream, ChatPlan, SamplingParams]:
        """Submit a chat. With `effort`, the client is an agent: options it cannot know are adapted to the model."""
        body = body.with_defaults(self.defaults)
        params, is_agent = body.sampling(), effort is not None
        plan = await self.bridge.offload(plan_chat, self.llm.tokenizer, body, effort, client=client_of(request.scope))
        params = replace(params, **{**NO_GRAMMAR, **plan.grammar}) if plan.grammar else params
        bound = None if plan.grammar or plan.trigger is None else await self._bind(plan.trigger, request)
        if bound:
            plan = replace(plan, reader=partial(plan.reader, eager=True))

        def asks(llm: Any) -> Iterable[Ask]:
            if body.truncate_prompt_tokens is None:
                for message in body.messages:
                    refuse_long(llm, message.text)
            tokens = truncated(llm, plan.encode(llm.tokenizer, body), params, body.truncate_prompt_tokens)
            yield tokens, self._fit(llm, tokens, params, at_most=is_agent)

        return await self._submit(request, asks, body.n, params, body, stream, bound), plan, params

    async def _bind(self, trigger: Trigger, request: Request) -> Callable[[], Any] | None:
        """Factory of grammars that constrain from the start of a tool call on; None where calls are unconstrained."""
        params = SamplingParams(grammar=trigger.grammar)
        try:
            return trigger.bind(await self.bridge.compile(params, client_of(request.scope)), self.llm.tokenizer)
        except errors.APIError:
            return None

    async def embed(self, body: EmbeddingRequest, request: Request) -> Response:
        """/v1/embeddings."""
        return await self.respond(request, *await embeddings.embed(self, body, request))

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        """/v1/score."""
        return json_response(await embeddings.score(self, body, request))

    async def generate(self, body: GenerateRequest, request: Request) -> Response:
        """/generate/."""
        params = body.sampling()
        asks = self._continuing(body.prompts, params, DEFAULT_GENERATION)
        flow = await self._submit(request, asks, len(body.prompts), params)
        try:
            outputs = await flow.outputs()
        finally:
            self.close(request, flow)
        return json_response(
            {
                "idx": [[*output.prompt_token_ids, *output.token_ids] for output in outputs],
                "text": [output.text for output in outputs],
                "finish_reason": [output.finish_reason for output in outputs],
            }
        )

    async def tokenize(self, body: TokenizeRequest, request: Request) -> Response:
        """/tokenize."""
        self.adapter_of(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise errors.invalid("give either prompt or messages", "prompt")
        tokenized = await self.bridge.offload(self._tokenized, self.llm, body, client=client_of(request.scope))
        return Response(tokenized, media_type="application/json")

    def _tokenized(self, llm: Any, body: TokenizeRequest) -> bytes:
        tokens = llm.encode(body.prompt) if body.messages is None else encode_conversation(llm.tokenizer, body.messages)
        names = [self.words.text(token) for token in tokens]
        told = {"count": len(tokens), "max_model_len": llm.max_seq_len, "tokens": tokens, "token_strs": names}
        return to_json_in_parts(told, levels=1)

    async def detokenize(self, body: DetokenizeRequest, request: Request) -> Response:
        """/detokenize."""
        self.adapter_of(body.model)
        if self.llm.tokenizer is None:
            raise errors.invalid("this model has no tokenizer")
        decode = self.llm.tokenizer.decode
        text = await self.bridge.offload(decode, body.tokens, client=client_of(request.scope))
        return json_response({"prompt": text})

    def models(self) -> list[dict[str, Any]]:
        """/v1/models: the model, its adapters, then the further models."""
        longest = self.bridge.llm.max_seq_len if self.bridge.llm else None
        model = {"object": "model", "created": self.started, "owned_by": "warploom", "max_model_len": longest}
        known = [{"id": name, **model} for name in (*self.config.names, *self.adapters)]
        return known + [{"id": name, **model, "max_model_len": None} for name in self.further]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self.bridge.llm.adapters) if self.bridge.llm else ()

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request's `model` names, or None; 404 for a name that is not served."""
        if name is None or name in self.config.names:
            return None
        if name not in self.adapters:
            raise self.not_served(name)
        return name

    def not_served(self, name: str) -> errors.APIError:
        """404 error that lists the served names."""
        served = ", ".join(map(repr, (*self.config.names, *self.adapters, *self.further)))
        message = f"the model {name[:LOGGED]!r} is not served here; there is {served}"
        return errors.APIError(404, message, param="model", code="model_not_found")

    async def _submit(
        self,
        request: Request,
        asks: Callable[[Any], Iterable[Ask]],
        count: int,
        params: SamplingParams,
        body: Sampling | None = None,
        streaming: bool = False,
        grammar: Callable[[], Any] | None = None,
    ) -> RequestStream:
        scope, salt = request.scope, request.scope.get("salt")
        adapter = self.adapter_of(body and body.model)
        return await self.bridge.submit(
            partial(bounded, asks),
            count,
            params=params,
            grammar=grammar,
            streaming=streaming,
            salt=(salt, body.cache_salt) if body and body.cache_salt else salt,
            priority=body.priority if body else 0,
            adapter=adapter,
            client=client_of(scope),
            party=scope.get("party"),
            receive=request.receive,
        )

    def _continuing(
        self, prompts: list[str | list[int]], params: SamplingParams, default: int | None, truncate: int | None = None
    ) -> Callable[[Any], Iterable[Ask]]:
        def asks(llm: Any) -> Iterable[Ask]:
            for prompt in prompts:
                tokens = self.tokens_of(llm, prompt, params, truncate)
                yield tokens, self._fit(llm, tokens, params, default)

        return asks

    def tokens_of(
        self, llm: Any, prompt: str | list[int], params: SamplingParams, truncate: int | None = None
    ) -> list[int]:
        """Tokenize a prompt (or its end); one far beyond the context is refused before tokenizing."""
        if truncate is None:
            refuse_long(llm, prompt)
        return truncated(llm, llm.encode(prompt), params, truncate)

    def _fit(
        self, llm: Any, tokens: list[int], params: SamplingParams, default: int | None = None, at_most: bool = False
    ) -> SamplingParams:
        """Clamp max_tokens to the context, or refuse if it was given explicitly and does not fit.

        With `at_most` the number asked for is a bound, as other protocols mean it.
        """
        context, most, asked = llm.max_seq_len, self.config.max_tokens, params.max_tokens
        if at_most:
            default, asked = asked, None
        if len(tokens) + (1 if asked is None else asked) > context:
            wish = "" if asked is None else f" and {asked} more were asked for"
            message = f"the prompt has {len(tokens)} tokens{wish}; the model's context holds {context}"
            raise errors.invalid(message, "max_tokens" if asked else "prompt", "context_length_exceeded")
        if asked is not None and most is not None and asked > most:
            raise errors.invalid(f"max_tokens is {asked}; this server generates at most {most}", "max_tokens")
        if asked is not None:
            return params
        pool = llm.engine.scheduler.pool
        room = min(context, pool.num_pages * pool.page_size) - len(tokens)
        each = count_scores(params, 0, params.n)  # a token longer
        scored = (MOST_SCORES - count_scores(params, len(tokens), 0)) // each if each else None
        limits = [limit for limit in (room, most, default, scored) if limit is not None]
        return replace(params, max_tokens=max(1, min(limits)))

    def _head(
        self, kind: str, body: CompletionRequest | ChatRequest | AgentRequest, request: Request
    ) -> dict[str, Any]:
        """Fields common to every response and chunk."""
        visit = request.scope["visit"]
        if body.user is not None:
            visit.record["user"] = body.user[:LOGGED]
        head = {
            "id": f"{kind}-{visit.id}",
            "created": int(time.time()),
            "model": body.model or self.config.name,
            "system_fingerprint": FINGERPRINT,
        }
        return {**head, "usage": None} if body.include_usage else head

    async def _answer(
        self, request: Request, stream: bool, flow: RequestStream, writer: Writer, params: SamplingParams
    ) -> Response:
        if stream:
            chunks = self._chunks(request, flow, writer, params)
            first = await anext(chunks, None)  # an error before the first token still gets its own status
            if first is None:
                raise errors.gone()
            return EventStream(first, chunks, self.config.request_timeout + LAST_EVENTS, writer.error)
        try:
            await flow.outputs()
            generated = sum(each.metrics.generated_tokens for each in flow.streams)
            size = generated + count_scores(params, flow.prompt_tokens, generated)
            return await self.respond(request, lambda: to_json_in_parts(writer.whole()), size)
        finally:
            self.close(request, flow)

    async def respond(self, request: Request, make: Callable[[], bytes], size: int) -> Response:
        """Response written by `make`, of about `size` numbers."""
        return Response(await self._write(request, make, size), media_type="application/json")

    async def _write(self, request: Request, make: Callable[[], bytes], size: int) -> bytes:
        """Serialize the body, in a worker thread if it would block the event loop too long."""
        if size <= INLINE:
            return make()
        return await self.bridge.offload(make, client=client_of(request.scope))

    async def _chunks(
        self, request: Request, flow: RequestStream, writer: Writer, params: SamplingParams
    ) -> AsyncGenerator[bytes]:
        collector, spoke = writer.collector(), {}
        try:
            async for events in flow.batches():
                generated = sum(len(event.piece.logprobs) for event in events)
                echoed = 0 if all(event.index in spoke for event in events) else flow.prompt_tokens
                size = count_scores(params, echoed, generated)
                self.metrics.stream(events, spoke)
                parts = collector.collect(events)
                encode = to_json if size <= INLINE else to_json_in_parts
                make = partial(_events, writer, parts, encode)
                if chunks := await self._write(request, make, size):
                    yield chunks
            if not flow.gone:
                last = b""
                if isinstance(writer, (ChatWriter, CompletionWriter)) and writer.counts_usage:
                    last = server_sent(writer.last())
                yield last + writer.end
        finally:
            self.close(request, flow)

    def close(self, request: Request, flow: RequestStream) -> None:
        """Close a request and log it."""
        flow.close()
        self.metrics.request(flow)
        streams = flow.streams
        request.scope["visit"].record |= {
            "prompt_tokens": flow.prompt_tokens,
            "completion_tokens": sum(stream.metrics.generated_tokens for stream in streams),
            "finish_reason": sorted({stream.sequence.finish_reason or "cancelled" for stream in streams}),
            "client_left": flow.gone,
        }


def _events(writer: Writer, parts: list, encode: Callable[[Any], bytes]) -> bytes:
    return b"".join([server_sent(chunk, encode) for part in parts for chunk in writer.chunks(*part)])


def json_response(value: Any) -> Response:
    """JSON response by the standard library's fastest path."""
    return Response(to_json(value), media_type="application/json")


def _fingerprint() -> str:
    try:
        return f"warploom-{version('warploom')}"
    except PackageNotFoundError:
        return "warploom-source"


FINGERPRINT = _fingerprint()
