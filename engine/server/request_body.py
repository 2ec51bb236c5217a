"""Request bodies: JSON parsing and validation bounded in time and memory, large ones in a worker thread.

What a hostile body may cost: pydantic gathers an error for every element of a list and for every arm of a union, 4 MB
of `[]` once took 50 seconds and 6 GB. Here the first element chooses a union's arm, the first wrong element ends a list
(`FIRST_ERROR`), and mappings are counted before they are looked into. Strings with half of a surrogate pair and nesting
beyond 200 levels are refused by the parser, so nothing behind it ever meets them.

A worker thread does not help the event loop while it is inside one call that holds Python's lock: 1.4 million empty
lists kept it, with the garbage collector's rounds, for 0.4 s of CPU time. So lists, objects and values are counted
first, by numpy, which does not hold it; what is parsed and validated then takes some 80 ms at most. That is done for
one body at a time, and the loop gets a turn before each of the two calls: four at once made /health take a second.
"""

from __future__ import annotations

import email.message
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, FailFast, ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from ..errors import InputError
from .openai import errors

IGNORED = "x-warploom-ignored"  # header that names fields which were passed over
INLINE = 1 << 16  # bytes that are parsed on the event loop: a millisecond
MOST_CONTAINERS = 1 << 14  # lists and objects in a body: validating one takes up to 5 µs
MOST_VALUES = 1 << 20
Kind = TypeVar("Kind", bound=BaseModel)


class _FirstError(FailFast):
    __hash__ = object.__hash__  # pydantic's own cannot stand in a union


FIRST_ERROR = _FirstError()


def at_most(count: int) -> BeforeValidator:
    """Validator that refuses mappings with more entries, before any is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise InputError(f"at most {count} entries are allowed, got {len(value)}")
        return value

    return BeforeValidator(check)


class BodyRoute(APIRoute):
    """FastAPI route that parses `body` itself. Endpoints take `(body, request)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook: handler of a request."""
        if self.body_field is None:
            return super().get_route_handler()
        kind, endpoint = self.body_field.field_info.annotation, self.endpoint

        async def handle(request: Request) -> Response:
            body, ignored = await _read(kind, request)
            answer = await endpoint(body, request)
            if ignored := [name for name in ignored if name.isascii() and name.isprintable()]:
                answer.headers[IGNORED] = ", ".join(ignored)[:1024]
            return answer

        return handle


def parse(
    kind: type[Kind], content: bytes, lenient: bool = False, pause: Callable[[], None] = lambda: None
) -> tuple[Kind, list[str]]:
    """Parse a request; return it with the names of ignored fields; raises APIError.

    `pause()` is called before each call that holds the interpreter lock for as long as a large body takes."""
    if len(content) > INLINE:
        _refuse_many(content)
    pause()
    try:
        value = from_json(content)
    except ValueError as error:
        raise errors.invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    unknown = getattr(kind, "unknown", None) if lenient and isinstance(value, dict) else None
    dropped = sorted(unknown(value)) if unknown else []
    for name in dropped:
        del value[name]
    pause()
    try:
        body = kind.model_validate(value)
        return body, dropped + getattr(body, "ignored", list)()
    except ValidationError as error:
        raise errors.from_validation(error.errors(include_url=False, include_context=False)) from None


def _refuse_many(content: bytes) -> None:
    """Refuse JSON with too many elements, by counting commas and brackets outside of strings."""
    signs = np.frombuffer(content.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    outside = np.cumsum(signs == ord('"'), dtype=np.uint8) & 1 == 0  # an even number of quotes before
    containers = np.count_nonzero(outside & (signs | 32 == ord("{")))  # [ is { with one bit less
    values = np.count_nonzero(outside & (signs == ord(",")))
    for count, most, kind in ((containers, MOST_CONTAINERS, "lists and objects"), (values, MOST_VALUES, "values")):
        if count > most:
            raise errors.invalid(f"the body holds {count} {kind}; at most {most} are read")


async def _read(kind: type[Kind], request: Request) -> tuple[Kind, list[str]]:
    content = await request.body()
    if not content or not _is_json(request.headers.get("content-type", "")):
        raise errors.not_an_object()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise errors.APIError(415, "the body must not be compressed: send it without content-encoding")
    lenient = request.app.state.bridge.config.lenient
    if len(content) <= INLINE:
        return parse(kind, content, lenient)
    return await request.app.state.bridge.read(parse, kind, content, lenient, client=client_of(request.scope))


def client_of(scope: Any) -> Any:
    """Client identity for fairness: API key, else address."""
    return scope.get("salt") or (scope.get("client") or (None,))[0]


def _is_json(header: str) -> bool:
    """Return whether a content type is JSON, which no HTML form can send (protection against CSRF)."""
    message = email.message.Message()
    message["content-type"] = header
    kind = message.get_content_type()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
