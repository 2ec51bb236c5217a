"""ASGI middleware: API keys, body-size limit, request ids, JSON access log.

A plain ASGI middleware around everything, the playground included, so that no route can be forgotten. It gives each
request an id, asks for a key, bounds the body, turns whatever was not caught into a 500 that tells nothing, and writes
one line of JSON a request. Prompts and answers are never written.

Keys are compared as SHA-256 digests in constant time, all of them whatever the outcome, so the time an answer takes
says nothing about how close a guess was. Browsers ask their users for name and password: the key is the password.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import InputError
from .config import ServerConfig
from .log import WRITER
from .openai.errors import APIError
from .request_body import client_of

OPEN_ROUTES = {"/health"}
# Pages load and send nothing elsewhere: not even an image that a model's answer names. Gradio needs inline scripts.
PAGE_POLICY = "; ".join(
    [
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
HELD = 64  # times the largest body: bytes of bodies that are held at once, by all clients
LOGGED = 256  # characters of what a client chose to send: a path, its user
TRACE = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")  # OpenTelemetry's, by W3C
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
logger = logging.getLogger("warploom.server")
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class RequestMiddleware:
    """ASGI middleware; `record(request)` in the scope lets handlers add to the log line."""

    def __init__(self, app: Any, config: ServerConfig, keys: tuple[str, ...], visits: Any) -> None:
        if any(not key for key in keys):
            raise InputError("an API key must not be empty")
        self._app, self._config, self._visits = app, config, visits
        self._keys = [_digest(key.encode()) for key in keys]
        self._held: Counter = Counter()  # bytes of bodies by client

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return await asyncio.to_thread(WRITER.flush)
        if scope["type"] != "http":  # nothing here speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        visit = RequestContext(scope, send)
        try:
            self._admit(visit)
            await self._app(scope, self._bounded(receive, visit), visit.send)
        except APIError as error:
            await visit.refuse(error)
        except HTTPException as error:
            await visit.refuse(APIError(error.status_code, str(error.detail)))
        except ClientDisconnect:
            visit.status = visit.status or 499
        except asyncio.TimeoutError:  # it does not read its answer
            visit.status = visit.status or 499
        except Exception:
            logger.exception("request %s failed", visit.id)
            await visit.refuse(APIError(500, f"internal error; the server's log has it as {visit.id}"))
        finally:
            self._write(visit)
            client = client_of(scope)
            self._held[client] -= visit.held
            if not self._held[client]:
                del self._held[client]

    def _admit(self, visit: RequestContext) -> None:
        headers = visit.headers
        if sum(name == b"host" for name, _ in visit.scope["headers"]) > 1:
            raise APIError(400, "more than one Host header")
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise self._too_large()
        if not self._keys or visit.scope["path"].removeprefix(visit.scope.get("root_path", "")) in OPEN_ROUTES:
            return
        given = _digest(headers.get(b"x-api-key") or _key_of(headers.get(b"authorization", b"")))
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(matches):
            message = "a valid API key is needed: send it as the header Authorization: Bearer KEY"
            challenge = {"www-authenticate": 'Basic realm="warploom: any name, the API key as password"'}
            raise APIError(401, message, code="invalid_api_key", headers=challenge)
        visit.record["key"] = matches.index(True)
        visit.scope["salt"] = self._keys[matches.index(True)]  # whoever has another key shares no cached prefixes
        if len(self._keys) > 1:
            visit.scope["party"] = visit.scope["salt"]

    def _check_host(self, host: str) -> None:
        """Refuse foreign host names (DNS rebinding); addresses are always accepted."""
        names = self._config.allowed_hosts
        name = urlsplit(f"//{host}").hostname if host else None
        if names and name and name not in names and not _is_address(name):
            raise APIError(421, f"the host {name[:LOGGED]!r} is not served here: start the server with --allowed-hosts")

    def _bounded(self, receive: Receive, visit: RequestContext) -> Receive:
        async def bounded() -> dict:
            message = await receive()
            self._hold(visit, len(message.get("body", b"")))
            return message

        return bounded

    def _hold(self, visit: RequestContext, size: int) -> None:
        """Account a body's bytes until its request ends; one client may not hold more than is left for others."""
        most, client = self._config.max_body_bytes, client_of(visit.scope)
        visit.held += size
        self._held[client] += size
        if visit.held > most:
            raise HTTPException(413, self._too_large().message)
        if size and self._held[client] > HELD * most - self._held.total():
            raise HTTPException(503, "too many bodies are being read: try again", {"retry-after": "2"})

    def _too_large(self) -> APIError:
        return APIError(413, f"the body is larger than {self._config.max_body_bytes} bytes", code="body_too_large")

    def _write(self, visit: RequestContext) -> None:
        route = visit.route or getattr(visit.scope.get("route"), "path", None) or "other"
        self._visits.labels(visit.scope["method"], route, visit.status).inc()
        if self._config.log:
            WRITER.write(json.dumps(visit.line()))


class RequestContext:
    """State of one request in the middleware."""

    def __init__(self, scope: dict, send: Send) -> None:
        self.scope, self._send = scope, send
        self.headers = dict(scope["headers"])
        self.start = time.monotonic()
        self.status = 0
        self.held = 0  # bytes of the body
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        self.record: dict[str, Any] = {}
        if trace := TRACE.fullmatch(self.headers.get(b"traceparent", b"")):
            self.record["trace_id"] = trace[1].decode()
        self.route: str | None = None  # where whoever answers knows it, and the scope does not
        scope["visit"] = self

    async def send(self, message: dict) -> None:
        """Send a message, with the request id in its headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            if dict(headers).get(b"content-type", b"").startswith(b"text/html"):
                headers.append((b"content-security-policy", PAGE_POLICY.encode()))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: APIError) -> None:
        """Respond with an error, if the response has not begun."""
        if self.status:
            return
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    def line(self) -> dict[str, Any]:
        """Fields of the request's log line."""
        now = time.time()
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
            "request_id": self.id,
            "client": (self.scope.get("client") or ("unix",))[0],
            "method": self.scope["method"],
            "path": self.scope["path"][:LOGGED],
            "status": self.status,
            "seconds": round(time.monotonic() - self.start, 4),
            **self.record,
        }


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _key_of(header: bytes) -> bytes:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
