"""Several engines behind one door: `warploom serve --replicas N`, through Ray Serve.

Every replica is the whole server as it is without replicas, in a Ray actor: the same application with the same routes,
its bridge and its engine. What stands at the port is a front that knows no route but two. It asks for the key, writes
the log, and hands each request on to the replica that `affinity` names, as ASGI messages both ways, so that a stream
stays a stream and nothing about the protocol is said twice. /health and /metrics are about all replicas.

Ray Serve starts the replicas, asks each every second whether it is well, and replaces one that is not. A request whose
replica dies gets 500, and is not carried to another: it may be what killed it. One that a replica refuses because its
queue is full, or because it is about to end, goes to the next.

Ray trusts whoever reaches its ports, so a Ray of our own listens to 127.0.0.1 alone, and asks for a token that only its
own processes have. With RAY_ADDRESS in the environment the replicas go to that cluster, which has its own rules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

OWN_RAY = "RAY_ADDRESS" not in os.environ
if OWN_RAY:  # read when ray is imported; the name of the second one notwithstanding, it means "loopback only"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # half the cost of a chunk

import ray  # noqa: E402
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.request_router import RequestRouter  # noqa: E402
from starlette.middleware.cors import CORSMiddleware  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402

from . import errors  # noqa: E402
from .affinity import Affinity, chain_of  # noqa: E402
from .answers import server_sent  # noqa: E402
from .app import allowed_origins, create_app  # noqa: E402
from .config import ServerConfig  # noqa: E402
from .guard import Guard  # noqa: E402
from .metrics import Metrics, count_visits, join_replicas  # noqa: E402

APPLICATION = "warploom"
SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client")
SCOPE += ("server", "salt")
REFUSED_FOR_NOW = (429, 503)
NO_QUEUE = 1 << 20  # requests that Ray may send to a replica: the replica has a queue of its own, and says 429
STORE = 80 << 20  # bytes of shared memory for Ray's objects, of which we have none; the least it accepts
logger = logging.getLogger("warploom.server")


class Replica:
    """One engine and its application, in an actor."""

    async def __init__(self, make: Callable[[], Any], config: ServerConfig) -> None:
        self._mistake = ""
        self._running: set[asyncio.Task] = set()
        self._app = create_app(lambda: self._make(make), replace(config, log=False, cors_origins=()))
        self._bridge = self._app.state.bridge
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()
        while self._bridge.state == "loading":
            await asyncio.sleep(0.05)
        self.check_health()

    def _make(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ValueError as error:  # the next attempt would end the same way
            self._mistake = str(error)
            raise

    async def visit(self, scope: dict[str, Any], body: bytes, **_: Any) -> AsyncIterator[list[dict]]:
        """Answer a request: ASGI messages, as many at a time as there are; at the end, what the log should say."""
        told: asyncio.Queue[dict] = asyncio.Queue()
        gone = asyncio.Event()
        sent = [{"type": "http.request", "body": body}]

        async def receive() -> dict:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(scope, receive, told.put)
            finally:
                route = getattr(scope.get("route"), "path", None)
                told.put_nowait({"type": "end", "record": scope["visit"].record, "route": route})

        task = asyncio.create_task(answer())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            ended = False
            while not ended:
                messages = [await told.get()]
                while not told.empty():
                    messages.append(told.get_nowait())
                ended = messages[-1]["type"] == "end"
                if messages[0]["type"] == "http.response.start":
                    messages[0]["replica"] = self._name
                yield messages
        finally:
            gone.set()

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and its metrics as Prometheus reads them."""
        return self._name, self._app.state.metrics.text().decode()

    async def mistake(self) -> str:
        """What is wrong with what the server was told, if the engine says so."""
        return self._mistake

    def check_health(self) -> None:
        """Ray asks; an engine that has failed for good is replaced, replica and all."""
        if self._bridge.state == "failed" and not self._mistake:
            raise RuntimeError("the engine has failed")

    async def __del__(self) -> None:
        await self._life.__aexit__(None, None, None)

    @property
    def _name(self) -> str:
        return serve.get_replica_context().replica_id.unique_id


class PrefixRouter(RequestRouter):
    """Ray Serve's question, which replica; the answer is `Affinity`'s. It runs in the front's process."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Ray Serve."""
        self._affinity = Affinity()
        self._loads: Counter[str] = Counter()
        self._under_way: dict[str, str] = {}

    async def choose_replicas(self, candidate_replicas: list, pending_request: Any = None) -> list[list]:
        """The replicas, best first, each a rank of its own."""
        if pending_request is None:
            return [candidate_replicas]
        asked, future = pending_request.kwargs, pending_request.future
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        left = [name for name in names if name not in asked.get("avoid", ())]
        order = self._affinity.rank(asked.get("chain", ()), {name: self._loads[name] for name in left or names})
        request = pending_request.metadata.internal_request_id
        self._count(request, order[0])  # now, or all of a sudden rush would see the same loads
        future.add_done_callback(lambda chosen: self._count(request, None) if chosen.cancelled() else None)
        return [[names[name]] for name in order]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """A replica has taken a request."""
        self._count(pending_request.metadata.internal_request_id, replica_id.unique_id)
        self._affinity.remember(pending_request.kwargs.get("chain", ()), replica_id.unique_id)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """A request has ended, one way or another."""
        self._count(internal_request_id, None)

    def _count(self, request: str, name: str | None) -> None:
        """Where a request is now."""
        if before := self._under_way.pop(request, None):
            self._loads[before] -= 1
        if name:
            self._under_way[request] = name
            self._loads[name] += 1


class Front:
    """The ASGI application at the port."""

    def __init__(
        self,
        make: Callable[[], Any],
        config: ServerConfig,
        replicas: int,
        gpus: bool,
        on_mistake: Callable[[ValueError], None],
    ) -> None:
        self._make, self._config, self._count, self._gpus = make, config, replicas, gpus
        self._on_mistake = on_mistake
        self._handle: Any = None
        self._failed = False
        self.registry = CollectorRegistry()
        self.visits = count_visits(self.registry)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await _live(self.life, receive, send)
        route = {"/health": self._health, "/metrics": self._metrics}.get(scope["path"])
        if route and scope["method"] == "GET":
            scope["visit"].route = scope["path"]
            return await (await route())(scope, receive, send)
        await self._relay(scope, receive, send)

    @asynccontextmanager
    async def life(self) -> AsyncIterator[None]:
        """Start the replicas, which takes a while; end them."""
        starting = asyncio.create_task(self._start())
        yield
        starting.cancel()
        await asyncio.to_thread(disconnect)

    async def _start(self) -> None:
        try:
            self._handle = await asyncio.to_thread(deploy, self._make, self._config, self._count, self._gpus)
            mistakes = await self._handle.broadcast("mistake").results_async()
            if mistake := next(filter(None, mistakes), None):
                self._on_mistake(ValueError(mistake))
        except Exception:
            logger.exception("the replicas could not be started")
            self._failed = True

    async def _relay(self, scope: dict, receive: Any, send: Any) -> None:
        if self._handle is None:
            raise errors.unavailable("failed" if self._failed else "loading")
        body = await _read(receive)
        chain = chain_of(body, scope.get("salt")) if scope["method"] == "POST" else ()
        ask = {"scope": _portable(scope), "body": body, "chain": chain}
        refused: tuple[str, ...] = ()
        for last in [False] * (self._count - 1) + [True]:
            answer = Answer(self._handle.visit.remote(**ask, avoid=refused), scope["visit"], send)
            if not await answer.relay(receive, keep_refusal=last):
                return
            refused += (answer.replica,)

    async def _running(self) -> int:
        if self._handle is None:
            return 0
        status = await asyncio.to_thread(serve.status)
        return status.applications[APPLICATION].deployments[Replica.__name__].replica_states.get("RUNNING", 0)

    async def _health(self) -> Response:
        """Whether anybody serves."""
        with suppress(Exception):  # no word from Ray is a word too
            if running := await self._running():
                return JSONResponse({"status": "ok", "replicas": running, "wanted": self._count})
        state = "failed" if self._failed else "restarting" if self._handle else "loading"
        return JSONResponse({"status": state, "replicas": 0, "wanted": self._count}, 503)

    async def _metrics(self) -> Response:
        """Everybody's, each with the replica's name, and the front's own."""
        texts: list[Any] = []
        if self._handle is not None:
            with suppress(Exception):  # those that do not answer are not there
                texts = await self._handle.broadcast("metrics").results_async(timeout_s=5, return_exceptions=True)
        joined = join_replicas(text for text in texts if isinstance(text, tuple))
        return Response(generate_latest(self.registry) + joined, headers={"content-type": Metrics.content_type})


class Answer:
    """One replica's answer on its way to the client."""

    def __init__(self, messages: Any, visit: Any, send: Any) -> None:
        self._messages, self._visit, self._send = messages, visit, send
        self.replica = ""
        self._started = self._ended = self._gone = self._stream = False

    async def relay(self, receive: Any, keep_refusal: bool) -> bool:
        """Pass everything on; True if the replica has refused, which the client has not been told unless it should."""
        watcher = asyncio.create_task(self._watch(receive))
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
            watcher.cancel()
            self._messages.cancel()
        return False

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
        """The replica's answer has broken off: because the client left, the server stops, or the replica died."""
        if self._gone:
            self._visit.record["client_left"] = True
            self._visit.status = self._visit.status or 499
            return
        if isinstance(error, asyncio.CancelledError):
            raise error
        logger.error("request %s: its replica has died: %s", self._visit.id, type(error).__name__)
        if not self._started:
            raise errors.failed() from None
        if not self._stream:
            raise error
        await self._send({"type": "http.response.body", "body": server_sent(errors.failed().body)})


def create_front(
    make: Callable[[], Any],
    config: ServerConfig,
    keys: tuple[str, ...],
    replicas: int,
    gpus: bool,
    on_mistake: Callable[[ValueError], None],
) -> Any:
    """The application of a server with replicas; `make()` builds an `LLM`, and is sent to each of them.

    `on_mistake` hears the ValueError of a `make()` that can never succeed.
    """
    front = Front(make, config, replicas, gpus, on_mistake)
    door = Guard(front, config, keys, front.visits)
    return CORSMiddleware(door, **allowed_origins(config)) if config.cors_origins else door


def deploy(make: Callable[[], Any], config: ServerConfig, replicas: int, gpus: bool) -> Any:
    """Start the replicas, and wait until they have loaded; what to call them by."""
    if not ray.is_initialized():
        own = {"num_cpus": max(os.cpu_count() or 1, replicas), "include_dashboard": False, "object_store_memory": STORE}
        ray.init(**({"address": "local", **own} if OWN_RAY else {}), logging_level="ERROR", configure_logging=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(proxy_location="Disabled", logging_config=quiet)
    options = {
        "num_replicas": replicas,
        "ray_actor_options": share(replicas, gpus),
        "max_ongoing_requests": NO_QUEUE,
        "health_check_period_s": 1,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": config.drain_timeout,
        "request_router_config": {"request_router_class": PrefixRouter},
        "logging_config": quiet,
    }
    application = serve.deployment(Replica).options(**options).bind(make, config)
    return serve.run(application, name=APPLICATION, route_prefix=None).options(stream=True)


def share(replicas: int, gpus: bool) -> dict[str, float]:
    """What Ray should set aside for each replica: a GPU, if there are any, and its part of a node's cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = -(-replicas // len(nodes))
    cores = max(1, min(int(node.get("CPU", 1)) for node in nodes) // each)
    return {"num_cpus": cores, "num_gpus": int(gpus and any(node.get("GPU") for node in nodes))}


def disconnect() -> None:
    """End the replicas, and Ray if it is our own."""
    with suppress(Exception):
        if not OWN_RAY:
            serve.delete(APPLICATION)
    ray.shutdown()


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
    """A scope that can travel, with the id that its visit was given."""
    headers = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
    kept = {name: scope[name] for name in SCOPE if name in scope}
    return {**kept, "headers": [*headers, (b"x-request-id", scope["visit"].id.encode())]}


async def _live(life: Any, receive: Any, send: Any) -> None:
    """The ASGI lifespan protocol around a context manager."""
    await receive()
    async with life():
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
