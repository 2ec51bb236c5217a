"""uvicorn server with connection limits, non-blocking logs and graceful shutdown of streams."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from .config import ServerConfig
from .http_protocol import LimitedProtocol, Limits
from .log import LogHandler

FILES = 1 << 16
LAST_WORDS = 2  # seconds for the last events of streams that the drain limit ended


class HTTPServer(uvicorn.Server):
    """uvicorn server; `end_streams` fails what is left after the drain timeout."""

    def __init__(
        self,
        app: Any,
        config: ServerConfig,
        end_streams: Callable[[], None] | None = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(LimitedProtocol, limits=limits or Limits()),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=math.ceil(config.drain_timeout) + LAST_WORDS,
                **options,
            )
        )
        self._drain, self._end_streams = config.drain_timeout, end_streams or (lambda: None)

    async def shutdown(self, sockets: list | None = None) -> None:
        """Let requests finish; after the drain timeout tell the rest, before uvicorn cancels them."""
        local = [name for name in (each.getsockname() for each in sockets or ()) if isinstance(name, str)]
        timer = asyncio.get_running_loop().call_later(self._drain, self._end_streams)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            for path in local:  # here, since a signal is raised again after this
                Path(path).unlink(missing_ok=True)


def log_without_blocking() -> None:
    """Route warnings of all libraries to the writer thread."""
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def raise_file_limit() -> None:
    """Raise the limit of open files as far as the system allows: 1,024 is a common default, and soon full."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows; not where a container forbids it
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
