"""HTTP/1.1 with limits on head size and time (uvicorn's httptools protocol has none).

llhttp leaves limits to its caller (nodejs/llhttp issue 213). Without them one unfinished header of 300 MB held the
event loop for seven seconds, and 4,000 idle connections stayed for ever. A head may have 64 kB and 100 fields (431
beyond) and has 10 seconds to arrive; a body has to bring a kilobyte every 30 seconds (408), and may take 16 times its
size in chunks; a client that reads less than a kilobyte a minute is cut off, and what was generated for it with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

SLICE = 1 << 14  # bytes the parser gets at a time, so that it never holds much more than a head may have
PROGRESS = 1 << 10  # bytes sent or read that count as progress


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a connection."""

    head_bytes: int = 1 << 16
    head_fields: int = 100
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 60.0


class AnyLength(int):
    """Body length of a response that ends with its connection."""

    def __lt__(self, other: int) -> bool:
        return False

    def __sub__(self, other: int) -> AnyLength:
        return self


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, limits: Limits | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits or Limits()
        self._in_head = True
        self._in_body = False
        self._head_size = self._head_fed = 0  # bytes of complete fields; bytes fed since the head began
        self._body_size = 0  # bytes since the last progress
        self._around = 0  # bytes around those of the body, that its chunks take, beyond what they may
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._blocked: asyncio.TimerHandle | None = None

    # -- reading ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Start the timeout for the first request."""
        super().connection_made(transport)
        self._arm(self._limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        for timer in (self._timer, self._blocked):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the limits of the head."""
        for start in range(0, len(data), SLICE):
            if self._refused or self.transport.is_closing():
                return
            part = data[start : start + SLICE]
            super().data_received(part)
            self._count(len(part))

    def _count(self, size: int) -> None:
        if self._in_head:
            self._head_fed += size
            self._refused |= self._head_fed > self._limits.head_bytes
        if self._refused:
            return self._refuse(431)
        if self._in_body:
            self._body_size += size
            self._around += size
            if self._around > self._limits.head_bytes:
                return self._refuse(413)
            if self._body_size >= PROGRESS:
                self._body_size = 0
                self._arm(self._limits.body_seconds)
        elif self._timer is None and (self._in_head or not self._answering):
            self._arm(self._limits.head_seconds)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_size, self._head_fed = True, 0, 0
        self._arm(self._limits.head_seconds)

    def on_url(self, url: bytes) -> None:
        """Part of the request target."""
        super().on_url(url)
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header field."""
        if not self._refused:
            super().on_header(name, value)
            self._grow(len(name) + len(value) + 4)

    def _grow(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self._limits.head_bytes or len(self.headers) > self._limits.head_fields:
            self._refused = True

    def on_headers_complete(self) -> None:
        """Start the request, unless its head is too large."""
        self._in_head = False
        if self._refused:
            return
        self._in_body, self._body_size, self._around = True, 0, 0
        self._arm(self._limits.body_seconds)
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":  # knows no chunks
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, AnyLength()

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._around = max(self._around - 17 * len(body), 0)
        if not self._refused and self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._in_body = False
        self._disarm()
        if not self._refused and self.cycle is not None:
            super().on_message_complete()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._too_slow, seconds)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self, seconds: float) -> None:
        self._timer = None
        if self.flow.read_paused or (self._answering and not self.cycle.more_body):
            return self._arm(seconds)  # we are the slow one: an earlier request of this connection is being answered
        self._refuse(408 if self._head_fed or self._in_body else None)

    def _refuse(self, status: int | None) -> None:
        """Close the connection, with a status if none was sent."""
        if self.transport.is_closing():
            return
        if status is not None and not (self._answering and self.cycle.response_started):
            self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    # -- writing ----------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Flow control: the client reads too slowly."""
        super().pause_writing()
        self._watch_buffer()

    def resume_writing(self) -> None:
        """Flow control: the client has caught up."""
        super().resume_writing()
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

    def _watch_buffer(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._blocked = self.loop.call_later(self._limits.send_seconds, self._abort_if_stuck, size)

    def _abort_if_stuck(self, before: int) -> None:
        self._blocked = None
        if self.transport.get_write_buffer_size() > before - PROGRESS:
            self.transport.abort()
        elif self.flow.write_paused:
            self._watch_buffer()
