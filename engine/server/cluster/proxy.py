"""Reverse proxy over several engines: `warploom serve --replicas N`.

It knows no route but two. It asks for the key, writes the log, and hands each request on to a replica (`replicas.py`),
as ASGI messages both ways, so that a stream stays a stream and nothing about the protocol is said twice. /health and
/metrics are about all replicas.

A request whose replica dies gets 500, and is not carried to another: it may be what killed it. One that a replica
refuses because its queue is full, or because it is about to end, goes to the next. One for which no replica is alive
gets 503 after a moment, and when to come back.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from ...errors import InputError
from ..app import allowed_origins
from ..config import ServerConfig
from ..metrics import Metrics, count_visits, join_replicas
from ..middleware import RequestMiddleware
from ..openai import errors
from ..openai.responses import server_sent
from .prefix_routing import prefix_hashes
from .ray_replicas import Cluster

SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client")
SCOPE += ("server", "salt", "party")
REFUSED_FOR_NOW = (429, 503)
GRACE = 5.0  # seconds in which a replica should itself have said that a request's time is up
PATIENCE = 2.0  # seconds without an answer after which the front asks whether anybody is there to give one
logger = logging.getLogger("warploom.server")


def create_front(
    make: Callable[[], Any],
    config: ServerConfig,
    keys: tuple[str, ...],
    replicas: int,
    gpus: bool,
    on_mistake: Callable[[InputError], None],
) -> tuple[Any, Callable[[], None]]:
    """Make the proxy's ASGI application, and a function that ends its streams.

    `make()` builds an `LLM`, and is sent to each replica; `on_mistake` hears the InputError of a `make()` that can
    never succeed.
    """
    front = Front(make, config, replicas, gpus, on_mistake)
    door = RequestMiddleware(front, config, keys, front.visits)
    app = CORSMiddleware(door, **allowed_origins(config)) if config.cors_origins else door
    return app, front.end_streams


class Front:
    """ASGI application of the proxy."""

    def __init__(
        self,
        make: Callable[[], Any],
        config: ServerConfig,
        replicas: int,
        gpus: bool,
        on_mistake: Callable[[InputError], None],
    ) -> None:
        self._make, self._config, self._count, self._gpus = make, config, replicas, gpus
        self._on_mistake = on_mistake
        self._cluster = Cluster()
        self._handle: Any = None
        self._failed = False
        self._health_cache: asyncio.Task | None = None
        self._census_until = 0.0
        self._answers: set[Answer] = set()
        self.registry = CollectorRegistry()
        self.visits = count_visits(self.registry)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await _live(self.life, receive, send)
        route = {"/health": self._health, "/metrics": self._metrics}.get(scope["path"])
        if route and scope["method"] in ("GET", "HEAD"):
            scope["visit"].route = scope["path"]
            return await (await route())(scope, receive, send)
        await self._relay(scope, receive, send)

    @asynccontextmanager
    async def life(self) -> AsyncIterator[None]:
        """Lifespan: start the replicas (slow), stop them at the end."""
        starting = asyncio.create_task(self._start())
        yield
        starting.cancel()
        await asyncio.to_thread(self._cluster.end)

    async def _start(self) -> None:
        try:
            handle = await asyncio.to_thread(self._cluster.deploy, self._make, self._config, self._count, self._gpus)
            mistakes = await handle.broadcast("mistake").results_async()
            if mistake := next(filter(None, mistakes), None):
                return self._on_mistake(InputError(mistake))
            self._handle = handle
        except ConnectionError:
            self._on_mistake(InputError(f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"))
        except Exception:
            logger.exception("the replicas could not be started")
            self._failed = True

    async def _relay(self, scope: dict, receive: Any, send: Any) -> None:
        if self._handle is None:
            raise errors.unavailable("failed" if self._failed else "loading")
        body = await _read(receive)
        chain = prefix_hashes(body, scope.get("salt")) if scope["method"] == "POST" else ()
        ask = {"scope": _portable(scope), "body": body, "chain": chain}
        refused: tuple[str, ...] = ()
        for last in [False] * (self._count - 1) + [True]:
            messages = self._handle.visit.remote(**ask, avoid=refused)
            answer = Answer(messages, scope["visit"], send, self._config.request_timeout, self._well)
            self._answers.add(answer)
            try:
                if not await answer.relay(receive, keep_refusal=last):
                    return
            finally:
                self._answers.discard(answer)
            refused += (answer.replica,)

    def end_streams(self) -> None:
        """Fail all requests in progress, at shutdown."""
        for answer in list(self._answers):
            answer.fail(errors.unavailable("stopping"))

    def _well(self) -> asyncio.Future[int]:
        """Number of healthy replicas; Ray is asked at most once in a while."""
        now = asyncio.get_running_loop().time()
        if self._health_cache is None or now > self._census_until:
            asking = asyncio.to_thread(self._cluster.running)
            self._health_cache, self._census_until = asyncio.create_task(asking), now + PATIENCE / 2
        return asyncio.shield(self._health_cache)

    async def _health(self) -> Response:
        """Health response: 200 if any replica serves."""
        with suppress(Exception):  # no word from Ray is a word too
            if self._handle and (well := await self._well()):
                return JSONResponse({"status": "ok", "replicas": well, "wanted": self._count})
        state = "failed" if self._failed else "restarting" if self._handle else "loading"
        return JSONResponse({"status": state, "replicas": 0, "wanted": self._count}, 503)

    async def _metrics(self) -> Response:
        """Metrics of all replicas, labeled by name, and of the proxy."""
        texts: list[Any] = []
        if self._handle is not None:
            with suppress(Exception):  # those that do not answer are not there
                texts = await self._handle.broadcast("metrics").results_async(timeout_s=5, return_exceptions=True)
        joined = join_replicas(text for text in texts if isinstance(text, tuple))
        return Response(generate_latest(self.registry) + joined, headers={"content-type": Metrics.content_type})


class Answer:
    """Response of a replica on its way to the client."""

    def __init__(self, messages: Any, visit: Any, send: Any, limit: float, well: Callable[[], Any]) -> None:
        self._messages, self._visit, self._send, self._limit, self._well = messages, visit, send, limit, well
        self.replica = ""
        self._failure = errors.failed()
        self._started = self._ended = self._gone = self._stream = False

    async def relay(self, receive: Any, keep_refusal: bool) -> bool:
        """Forward the response; return True if the replica refused and the client has not been told."""
        watchers = asyncio.create_task(self._watch(receive)), asyncio.create_task(self._ask_for_replicas())
        timer = asyncio.get_running_loop().call_later(self._limit + GRACE, self._give_up)
        try:
            async for messages in self._messages:
                if not self._started and not keep_refusal and messages[0].get("status") in REFUSED_FOR_NOW:
                    self.replica = messages[0]["replica"]
                    return True
                for message in messages:
                    await self._pass_on(message)
        except (Exception, asyncio.CancelledError) as error:
            await self._end(error)
        finally:
            for watcher in watchers:
                watcher.cancel()
            timer.cancel()
            self._messages.cancel()
        return False

    def _give_up(self) -> None:
        """Answer 504: no response began within the time limit."""
        self.fail(errors.too_slow(self._limit))

    def fail(self, error: errors.APIError) -> None:
        """End the answer with an error."""
        self._failure = error
        self._messages.cancel()

    async def _ask_for_replicas(self) -> None:
        """While there is no answer, check that any replica is alive."""
        await asyncio.sleep(PATIENCE)
        while not self._started:
            with suppress(Exception):  # without a word from Ray, a replica may yet answer
                if not await self._well() and not self._started:
                    return self.fail(errors.unavailable("restarting"))
            await asyncio.sleep(PATIENCE)

    async def _pass_on(self, message: dict) -> None:
        if message["type"] == "end":
            self._visit.record |= message["record"]
            self._visit.route = message["route"]
            return
        if message["type"] == "http.response.start":
            self._started = True
            headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            self._stream = (b"content-type", b"text/event-stream; charset=utf-8") in headers
            message = {"type": message["type"], "status": message["status"], "headers": headers}
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._ended:
            self._gone = True
            self._messages.cancel()

    async def _end(self, error: BaseException) -> None:
        """The replica's response broke off: the client left, the server stops, or the replica died."""
        if self._gone:
            self._visit.record["client_left"] = True
            self._visit.status = self._visit.status or 499
            return
        if self._failure.status == 500:
            if isinstance(error, asyncio.CancelledError):
                raise error
            logger.error("request %s: its replica has died: %s", self._visit.id, type(error).__name__)
        if not self._started:
            raise self._failure from None
        if not self._stream:
            raise error
        await self._send({"type": "http.response.body", "body": server_sent(self._failure.body)})


async def _read(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.gone()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _portable(scope: dict) -> dict:
    """Serializable ASGI scope, with the request's id."""
    headers = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
    kept = {name: scope[name] for name in SCOPE if name in scope}
    return {**kept, "headers": [*headers, (b"x-request-id", scope["visit"].id.encode())]}


async def _live(life: Any, receive: Any, send: Any) -> None:
    """ASGI lifespan protocol around a context manager."""
    await receive()
    async with life():
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
