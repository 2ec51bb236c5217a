"""Bridge between the event loop and the engine's thread, with backpressure on both sides.

The engine computes in a thread of its own and tells each new token through a callback. Those callbacks must cost the
engine nothing: they put the piece into a mailbox and ring the loop's bell once, however many pieces lie there by the
time the loop looks. On the loop's side a `RequestStream` is all that one HTTP request asked for, as an asynchronous
iterator of batches of pieces.

A supervisor watches the engine: a thread that died, steps that fail one after the other, or no progress at all mean
that it is broken. Its requests fail, it is built anew, once; `/health` says so all along. When it breaks again within
an hour, `on_failure` is called: `warploom serve` then exits with 1, for whoever supervises it to start it again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from ..errors import InputError
from ..serving import Piece, SamplingParams, prompt_cache
from ..serving import structured_output as grammars
from ..serving.fair_pool import FairPool, PoolFull
from .config import ServerConfig
from .openai import errors
from .request_stream import Event, RequestStream

Result = TypeVar("Result")
Ask = tuple[list[int], SamplingParams]
FAILURES = 3  # failed steps of single sequences, with no token between them, that mean a broken engine
HEALTHY = 3600.0  # seconds without a failure after which one more restart is due
SHARE = 2  # a party's places by the free ones ("dynamic thresholds"): alone two thirds, two of them two fifths each
logger = logging.getLogger("warploom.server")


class AsyncEngine:
    """Asynchronous interface of one engine, shared by all requests; `make` builds its `LLM`."""

    def __init__(
        self, make: Callable[[], Any], config: ServerConfig, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self.config = config
        self.llm: Any = None
        self._state = "loading"
        self.restarts = 0
        self.error = ""  # why the model could not be loaded, in words for whoever started the server
        self.flows: set[RequestStream] = set()
        self.open = 0  # continuations under way, waiting ones included
        self.holds: Counter = Counter()  # the same by party
        self._make, self._on_failure = make, on_failure
        self._mailbox: deque[tuple[RequestStream, Event]] = deque()
        self._ringing = False
        self._good_failures = 0  # the engine's count of such steps when it last brought a token
        self._duration = 1.0  # of a request, a running mean
        self._workers = FairPool(4, name="warploom-text")
        self._readers = FairPool(1, name="warploom-bodies")  # more would only wait for each other
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        """Start loading the model; requests get 503 until it is ready."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._live())]

    async def stop(self) -> None:
        """Cancel all requests and stop the engine's thread."""
        was_ready, self._state = self.engine_ready, "stopping"
        for task in self._tasks:
            task.cancel()
        for flow in list(self.flows):
            flow.fail(errors.unavailable("stopping"))
            flow.close()
        if self.llm is not None:
            await asyncio.to_thread(self.llm.engine.stop)
            if was_ready and self.config.prompt_cache is not None:
                await asyncio.to_thread(self._save_prompts)
        self._workers.shutdown()
        self._readers.shutdown()

    async def read(self, parse: Callable[..., Result], *arguments: Any, client: Any = None) -> Result:
        """Parse a large body in a thread of its own; the event loop gets a turn before each of the long calls."""
        return await self._run(self._readers, client, parse, *arguments, self._let_loop_turn)

    async def offload(self, work: Callable[..., Result], *arguments: Any, client: Any = None) -> Result:
        """Run slow work for a client (tokenizing, a template) in a thread pool, fair among clients."""
        return await self._run(self._workers, client, work, *arguments)

    def _let_loop_turn(self) -> None:
        turned = threading.Event()
        self._loop.call_soon_threadsafe(turned.set)
        turned.wait(1.0)  # a loop that takes longer has ended

    async def _run(self, pool: FairPool, client: Any, work: Callable[..., Result], *arguments: Any) -> Result:
        limit = self.config.request_timeout
        try:
            return await asyncio.wait_for(asyncio.wrap_future(pool.submit(client, work, *arguments)), limit)
        except PoolFull:
            raise errors.busy(self._retry_after()) from None
        except (TimeoutError, asyncio.TimeoutError):
            raise errors.too_slow(limit) from None
        except InputError as error:
            raise errors.from_input_error(error) from None

    @property
    def state(self) -> str:
        """State of the engine: loading, ready, restarting, stopping or failed."""
        dead = self._state == "ready" and not self.llm.engine.alive
        return "failed" if dead else self._state

    @property
    def engine_ready(self) -> bool:
        """Return whether requests are served."""
        return self.state == "ready"

    @property
    def capacity(self) -> int:
        """Maximum number of continuations in progress, queued ones included."""
        return self.llm.engine.scheduler.max_batch + self.config.max_queue

    async def submit(
        self,
        asks: Callable[[Any], Iterable[Ask]],
        count: int,
        *,
        params: SamplingParams | None = None,
        grammar: Callable[[], Any] | None = None,
        pooling: str | None = None,
        streaming: bool = False,
        salt: Any = None,
        priority: int = 0,
        adapter: str | None = None,
        client: Any = None,
        party: Any = None,
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]] | None = None,
    ) -> RequestStream:
        """Submit `count` continuations; `asks(llm)` yields the prompts' tokens, in a worker thread.

        `params` says whether there is a grammar to compile, `grammar` makes one that has been; `client` is whose turn
        it takes, `receive` tells when that client leaves; its body must have been read. A `party` is one of several
        that share the server: none may hold more than SHARE times the places it leaves free, so there are always some
        for another.
        """
        if not self.engine_ready:
            raise errors.unavailable(self.state)
        most = self.capacity if party is None else self.capacity * SHARE // (SHARE + 1)
        if count > most:
            raise errors.invalid(f"{count} continuations in one request; this server takes at most {most}")
        free = self.capacity - self.open - count
        if free < 0 or (party is not None and self.holds[party] + count > SHARE * free):
            raise errors.busy(self._retry_after())
        flow = RequestStream(self, count, streaming, party)
        self.open += count
        self.holds[party] += count
        self.flows.add(flow)
        if receive is not None:
            flow.watch(receive)
        try:
            await flow.wait_for(
                self._prepare(
                    flow,
                    asks,
                    params,
                    {"salt": salt, "adapter": adapter, "priority": priority, "grammar": grammar, "pooling": pooling},
                    client,
                )
            )
        except BaseException:
            flow.close()
            raise
        return flow

    def end_flows(self) -> None:
        """Fail all requests in progress, at shutdown."""
        for flow in list(self.flows):
            flow.fail(errors.unavailable("stopping"))

    def forget(self, flow: RequestStream) -> None:
        """Remove a closed request."""
        self.flows.discard(flow)
        self.open -= flow.places
        self.holds[flow.party] -= flow.places
        if not self.holds[flow.party]:
            del self.holds[flow.party]
        self._duration += 0.1 * (time.monotonic() - flow.arrival - self._duration)

    async def _prepare(
        self, flow: RequestStream, asks: Any, params: SamplingParams | None, options: dict[str, Any], client: Any
    ) -> None:
        if params is not None and params.constrained:
            options["grammar"] = await self.compile(params, client)
        await self.offload(self._submit, flow, asks, options, client=client)

    async def compile(self, params: SamplingParams, client: Any) -> Callable[[], Any]:
        """Compile a request's grammar; 400 if it takes too long itself, 503 if those before it do."""
        if self.llm is None:
            raise errors.unavailable(self.state)
        try:
            future = self.llm.grammars.start(params, client)
        except PoolFull:
            raise errors.compiling() from None
        except InputError as error:
            raise errors.from_input_error(error) from None
        compiled = asyncio.wrap_future(future)
        try:
            for _ in ("waiting", "compiling"):
                if (await asyncio.wait({compiled}, timeout=grammars.TIME_LIMIT))[0]:
                    return compiled.result()
                if future.cancel():
                    raise errors.compiling()
            raise grammars.too_slow(params)
        except InputError as error:
            raise errors.from_input_error(error) from None
        finally:
            future.cancel()

    def _submit(self, flow: RequestStream, asks: Callable[[Any], Iterable[Ask]], options: dict[str, Any]) -> None:
        llm, index = self.llm, 0
        if llm is None:  # it broke while this request waited for a thread
            raise errors.unavailable(self.state)
        for tokens, params in asks(llm):
            on_piece = partial(self._post, llm.engine, flow, index)
            flow.prompt_tokens += len(tokens)
            flow.generations.append(llm.submit(tokens, params, on_piece=on_piece, **options))
            index += params.n
            if flow.abandoned:  # while this thread was at it
                return flow.cancel()

    def _post(self, engine: Any, flow: RequestStream, base: int, piece: Piece) -> None:
        """Callback of the engine's thread for each piece; must be fast and must not raise."""
        if piece.token_ids:
            self._good_failures = engine.failed_alone
        if not flow.streaming and piece.finish_reason is None:
            return
        self._mailbox.append((flow, Event(base + piece.index, piece, time.monotonic())))
        if not self._ringing:
            self._ringing = True
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                self._loop.call_soon_threadsafe(self._empty_mailbox)

    def _empty_mailbox(self) -> None:
        self._ringing = False
        while self._mailbox:
            flow, event = self._mailbox.popleft()
            flow.deliver(event)

    def _retry_after(self) -> int:
        return min(max(math.ceil(self._duration), 1), 60)

    async def _live(self) -> None:
        """Supervise: load, watch, and reload a broken engine once, and once more after every hour of health."""
        restarted = False
        while True:
            try:
                self.llm = await asyncio.to_thread(self._make)
                await asyncio.to_thread(self.llm.grammars.prepare)
                await asyncio.to_thread(self._restore_prompts)
            except InputError as error:  # a mistake of whoever started the server, who is told it in one sentence
                self.error = str(error)
                logger.info("the engine could not be built: %s", error)
                self._state = "failed"
                return self._on_failure()
            except Exception:
                logger.exception("the engine could not be built")
                break
            self._good_failures = 0
            self.llm.engine.start()
            self._state, since = "ready", time.monotonic()
            await self._watch()
            self._abandon()
            if restarted and time.monotonic() - since < HEALTHY:
                break
            restarted = True
            self.restarts += 1
        self._state = "failed"
        logger.critical("the engine has failed and will not be restarted again")
        self._on_failure()

    def _prompt_file(self) -> Path:
        name = quote(self.config.name, safe="")
        return Path(self.config.prompt_cache or ".") / f"{name[:200]}.pages"

    def _restore_prompts(self) -> None:
        if self.config.prompt_cache is None:
            return
        prompt_cache.check(self.llm)
        path = self._prompt_file()
        try:
            if path.exists() and (pages := prompt_cache.restore(self.llm, path)):
                logger.warning("prompt cache: %d pages restored from %s", pages, path)
        except (InputError, OSError) as error:
            logger.warning("prompt cache: starting without: %s", error)

    def _save_prompts(self) -> None:
        """Save the prefix cache of an idle engine; a failure only costs the next start's time."""
        try:
            prompt_cache.save(self.llm, self._prompt_file())
        except Exception:
            logger.exception("prompt cache: not saved")

    async def _watch(self) -> None:
        """Wait until the engine is broken."""
        engine, progress, since, failures = self.llm.engine, None, time.monotonic(), 0
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            mark = (engine.generated_tokens, engine.failures, [s.computed for s in list(engine.scheduler.running)])
            if mark != progress or not self.open:
                progress, since = mark, now
            if engine.failures > failures:
                failures = engine.failures
                logger.error("a step of the engine has failed", exc_info=engine.last_error)
            if not engine.alive:
                return logger.critical("the engine's thread has died")
            if engine.failed_alone - self._good_failures >= FAILURES:
                return logger.critical("%d steps of the engine have failed in a row", FAILURES)
            if now - since > self.config.stall_timeout:
                return logger.critical("the engine has made no progress for %g s", self.config.stall_timeout)

    def _abandon(self) -> None:
        """Fail all requests of a broken engine and release its memory."""
        self._state = "restarting"
        for flow in list(self.flows):
            flow.fail(errors.failed())
        threading.Thread(target=self.llm.engine.stop, daemon=True).start()  # it may hang in its step for good
        self.llm = None
        gc.collect()
