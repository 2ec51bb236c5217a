"""Server-sent events; errors after the first event become events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from .openai import errors
from .openai.responses import server_sent


class EventStream(Response):
    """Response of server-sent events; an error after the first one becomes an event."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], seconds: float, tell: Callable[..., Any]) -> None:
        self.status_code, self.background = 200, None
        self._first, self._rest, self._seconds, self._tell = first, rest, seconds, tell
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all events, unless the client reads too slowly for too long."""
        await asyncio.wait_for(self._send_all(send), self._seconds)

    async def _send_all(self, send: Any) -> None:
        async with aclosing(self._rest) as rest:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for chunk in rest:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except errors.APIError as error:
                await send({"type": "http.response.body", "body": server_sent(self._tell(error)), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
