"""OpenAI's batch files without a server: a request a line in, a response a line out.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}
    {"id": "…", "custom_id": "a", "response": {"status_code": 200, "request_id": "…", "body": {…}}, "error": null}

The requests go through the same application as those of a server, so they mean the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ...tokenizer.sources import read_text
from ..errors import InputError
from .app import create_app
from .config import ServerConfig

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/score",
)
STREAMING = {"stream", "stream_options"}  # fields that mean nothing here
WEEK = 7 * 86400.0  # nobody waits for one of many


def read_batch(file: Path) -> list[dict[str, Any]]:
    """Read the requests of a batch file."""
    requests, seen = [], set()
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError:
            raise InputError(f"{file}:{number} is not JSON") from None
        if not isinstance(request, dict) or not isinstance(request.get("body"), dict):
            raise InputError(f"{file}:{number} needs custom_id, url and body")
        if request.get("url") not in URLS:
            raise InputError(f"{file}:{number}: url must be one of {', '.join(URLS)}, got {request.get('url')!r}")
        name = request.get("custom_id")
        if not isinstance(name, str) or name in seen:
            raise InputError(f"{file}:{number}: custom_id must be a text of its own, got {name!r}")
        seen.add(name)
        requests.append(request)
    return requests


def answered(out: Path | None) -> set[str]:
    """The `custom_id`s that a file of responses has successful ones for."""
    if out is None or not out.exists():
        return set()
    done = set()
    for line in read_text(out).splitlines():
        with suppress(ValueError, KeyError, TypeError):  # the last one may be torn
            response = json.loads(line)
            if response["response"]["status_code"] == 200:
                done.add(response["custom_id"])
    return done


def answer_batch(make: Callable[[], Any], requests: list[dict[str, Any]], out: TextIO) -> int:
    """Answer requests with the model that `make` opens, writing each as it finishes; return the failures.

    Whatever model they name is the one there is.
    """
    names = tuple({str(request["body"].get("model") or "model"): None for request in requests})
    limits = {"request_timeout": WEEK, "max_queue": 1 << 20, "max_body_bytes": 1 << 30}
    config = ServerConfig(served_model_name=names, name=names[0], ui=False, log=False, **limits)
    return asyncio.run(_answer_all(create_app(make, config), requests, out))


async def _answer_all(app: Any, requests: list[dict[str, Any]], out: TextIO) -> int:
    bridge, failed = app.state.bridge, 0
    async with app.router.lifespan_context(app):
        while bridge.state == "loading":
            await asyncio.sleep(0.01)
        if not bridge.engine_ready:
            raise InputError(bridge.error or "the model could not be opened")
        places = asyncio.Semaphore(bridge.llm.engine.scheduler.max_batch)

        async def answer(request: dict[str, Any]) -> None:
            nonlocal failed
            async with places:
                asked = {name: value for name, value in request["body"].items() if name not in STREAMING}
                status, body = await _ask(app, request["url"], asked)
            failed += status != 200
            told = {"status_code": status, "request_id": request["custom_id"], "body": body}
            line = {"id": f"batch_{request['custom_id']}", "custom_id": request["custom_id"], "response": told}
            print(json.dumps({**line, "error": None}, ensure_ascii=False), file=out, flush=True)

        await asyncio.gather(*map(answer, requests))
    return failed


async def _ask(app: Any, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Send one request to an ASGI application."""
    content, sent, asked = json.dumps(body).encode(), [], False
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": url, "raw_path": url.encode(), "query_string": b"", "root_path": "", "headers": headers}

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # the client never leaves
        asked = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))
