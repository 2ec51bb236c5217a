"""Ray Serve replicas: the whole server several times, each in an actor.

Every replica is what `warploom serve` is without replicas, in a Ray actor: the same application with the same routes,
its bridge and its engine, asked by ASGI messages instead of at a port. Ray Serve starts the replicas, asks each every
second whether it is well, and replaces one that is not; which one gets a request is `affinity`'s answer.

Ray trusts whoever reaches its ports, so a Ray of our own listens to 127.0.0.1 alone, and asks for a token that only its
own processes have. With RAY_ADDRESS in the environment the replicas go to that cluster, which has its own rules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ...errors import InputError

OWN_RAY = "RAY_ADDRESS" not in os.environ
if OWN_RAY:  # read when ray is imported; the name of the second one notwithstanding, it means "loopback only"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # half the cost of a chunk

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.request_router import RequestRouter  # noqa: E402

from ..app import create_app  # noqa: E402
from ..config import ServerConfig  # noqa: E402
from .prefix_routing import Affinity  # noqa: E402

APPLICATION = "warploom"
NO_QUEUE = 1 << 20  # requests that Ray may send to a replica: the replica has a queue of its own, and says 429
STORE = 80 << 20  # bytes of shared memory for Ray's objects, of which we have none; the least it accepts


class Replica:
    """Ray actor with one engine and its application."""

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
        except InputError as error:  # the next attempt would end the same way
            self._mistake = str(error)
            raise

    async def visit(self, scope: dict[str, Any], body: bytes, **_: Any) -> AsyncIterator[list[dict]]:
        """Handle a request: yield batches of ASGI messages, and at the end the fields of the log line."""
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
        """Name of this replica and its Prometheus metrics."""
        return self._name, self._app.state.metrics.text().decode()

    async def mistake(self) -> str:
        """Configuration error that the engine reports, if any."""
        return self._mistake

    def check_health(self) -> None:
        """Ray's health check; fails for an engine that has failed for good, so that Ray replaces the replica."""
        if self._bridge.state == "failed" and not self._mistake:
            raise RuntimeError("the engine has failed")

    async def __del__(self) -> None:
        await self._life.__aexit__(None, None, None)

    @property
    def _name(self) -> str:
        return serve.get_replica_context().replica_id.unique_id


class PrefixRouter(RequestRouter):
    """Ray Serve's request router, by `Affinity`; runs in the proxy's process."""

    def initialize_state(self, **_: Any) -> None:
        """Ray Serve's hook: initialize."""
        self._affinity = Affinity()
        self._loads: Counter[str] = Counter()
        self._under_way: dict[str, str] = {}

    async def choose_replicas(self, candidate_replicas: list, pending_request: Any = None) -> list[list]:
        """Rank the replicas, each in a rank of its own."""
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
        """Ray Serve's hook: a replica has taken a request."""
        self._count(pending_request.metadata.internal_request_id, replica_id.unique_id)
        self._affinity.remember(pending_request.kwargs.get("chain", ()), replica_id.unique_id)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Ray Serve's hook: a request has ended."""
        self._count(internal_request_id, None)

    def _count(self, request: str, name: str | None) -> None:
        """State of a request."""
        if before := self._under_way.pop(request, None):
            self._loads[before] -= 1
        if name:
            self._under_way[request] = name
            self._loads[name] += 1


class Cluster:
    """Ray and the replicas deployed on it.

    To ask a Ray that has been ended is to start another one, whoever in whichever thread it is: so all asking is done
    here, under a lock, and after `end` no more.
    """

    def __init__(self) -> None:
        self._asking, self._ended = threading.Lock(), False

    def deploy(self, make: Callable[[], Any], config: ServerConfig, replicas: int, gpus: bool) -> Any:
        """Deploy the replicas and wait until they have loaded; return the handle to call them."""
        with self._ray():
            _connect(replicas)
        with self._ray():
            handle = _start(make, config, replicas, gpus)
        while (found := self._application()).status != "RUNNING":
            if found.status == "DEPLOY_FAILED":
                raise RuntimeError(found.message)
            time.sleep(0.1)
        return handle

    def running(self) -> int:
        """Number of healthy replicas, as far as Ray knows."""
        return self._application().deployments[Replica.__name__].replica_states.get("RUNNING", 0)

    def end(self) -> None:
        """Delete the replicas, and stop Ray if we started it."""
        self._ended = True
        with self._asking:
            with suppress(Exception):
                if not OWN_RAY and ray.is_initialized():
                    serve.delete(APPLICATION)
            ray.shutdown()

    def _application(self) -> Any:
        with self._ray():
            return serve.status().applications[APPLICATION]

    @contextmanager
    def _ray(self) -> Iterator[None]:
        with self._asking:
            if self._ended:
                raise RuntimeError("the server is ending")
            yield


def _connect(replicas: int) -> None:
    if not ray.is_initialized():
        own = {"num_cpus": max(os.cpu_count() or 1, replicas), "include_dashboard": False, "object_store_memory": STORE}
        ray.init(**({"address": "local", **own} if OWN_RAY else {}), logging_level="ERROR")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _start(make: Callable[[], Any], config: ServerConfig, replicas: int, gpus: bool) -> Any:
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
    target = serve.RunTarget(application, name=APPLICATION, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    return handle.options(stream=True)


def share(replicas: int, gpus: bool) -> dict[str, float]:
    """Ray resources of a replica: what Ray should set aside for each replica: a GPU, if there are any, and its part of
    a node's cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = -(-replicas // len(nodes))
    cores = max(1, min(int(node.get("CPU", 1)) for node in nodes) // each)
    return {"num_cpus": cores, "num_gpus": int(gpus and any(node.get("GPU") for node in nodes))}
