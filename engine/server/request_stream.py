"""Stream of one HTTP request between engine thread and event loop.

A client that reads slowly gets larger batches, not a longer queue of small ones: under load, several tokens share one
chunk, and the server's cost per token falls when it matters. Whatever ends a request early (the client goes, its time
is up, the server stops) ends its flow, and closing a flow cancels its generations before the engine's next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..serving import Output, Piece
from ..serving import structured_output as grammars
from .openai import errors

if TYPE_CHECKING:
    from .async_engine import AsyncEngine


class Event(NamedTuple):
    """A piece with its continuation's number and arrival time."""

    index: int
    piece: Piece
    time: float


class RequestStream:
    """Stream of one HTTP request, on the event loop."""

    def __init__(self, bridge: AsyncEngine, count: int, streaming: bool, party: Any = None) -> None:
        self.count, self.streaming, self.party = count, streaming, party
        self.generations: list[Any] = []
        self.prompt_tokens = 0
        self.arrival = time.monotonic()
        self.gone = False  # the client has left
        self._bridge = bridge
        self._events: list[Event] = []
        self._bell = asyncio.Event()
        self._unfinished = self.places = count
        self._failure: errors.APIError | None = None
        self._preparing: asyncio.Future | None = None
        self._watcher: asyncio.Task | None = None
        self._closed = False
        limit = bridge.config.request_timeout
        self._timer = asyncio.get_running_loop().call_later(limit, self.fail, errors.too_slow(limit))

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Yield batches of new events until all continuations have ended; raise the error that ends
        the stream."""
        while self._unfinished and not self.gone:
            await self._bell.wait()
            self._bell.clear()
            events, self._events = self._events, []
            reasons = [event.piece.finish_reason for event in events if event.piece.finish_reason]
            self._unfinished -= len(reasons)
            if "error" in reasons:
                raise self._error()
            if self._failure and not self.gone:
                raise self._failure
            if events:
                yield events

    async def outputs(self) -> list[Output]:
        """Wait for the end; return all continuations, those of the first prompt first."""
        async for _ in self.batches():
            pass
        if self.gone:
            raise errors.gone()
        return [stream.output() for stream in self.streams]

    def _error(self) -> errors.APIError:
        """Error for a failed continuation: its grammar's, or an engine failure."""
        causes = [stream.error for stream in self.streams if isinstance(stream.error, grammars.GrammarError)]
        return errors.from_input_error(causes[0]) if causes else errors.failed()

    @property
    def streams(self) -> list[Any]:
        """The engine's `Continuation`s."""
        return [stream for generation in self.generations for stream in generation.streams]

    async def wait_for(self, preparation: Coroutine[Any, Any, None]) -> None:
        """Wait until the request is submitted, its time is up or its client has left."""
        self._preparing = asyncio.ensure_future(preparation)
        try:
            await self._preparing
        except asyncio.CancelledError:
            if self.gone:
                raise errors.gone() from None
            raise self._failure or asyncio.CancelledError from None

    def watch(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
        """Close the stream when the client disconnects; its body must have been read."""
        self._watcher = asyncio.create_task(self._wait_for_leave(receive))

    def deliver(self, event: Event) -> None:
        """Append an event, on the event loop."""
        if event.piece.finish_reason and not self._closed:  # its place is free, whenever the client reads
            self.places -= 1
            self._bridge.open -= 1
            self._bridge.holds[self.party] -= 1
        if not self.abandoned:
            self._events.append(event)
            self._bell.set()

    def fail(self, error: errors.APIError) -> None:
        """Fail the stream with an error."""
        self._failure = self._failure or error
        self._interrupt()

    @property
    def abandoned(self) -> bool:
        """Return whether nobody reads the stream any more."""
        return self.gone or self._closed

    def close(self) -> None:
        """Close; unfinished generations are cancelled before the engine's next step."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        self.cancel()
        self._bridge.forget(self)

    def cancel(self) -> None:
        """Cancel the generations before the engine's next step."""
        for generation in self.generations:
            generation.cancel()

    async def _wait_for_leave(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.cancel()
        self._interrupt()

    def _interrupt(self) -> None:
        self._bell.set()
        if self._preparing is not None:
            self._preparing.cancel()
