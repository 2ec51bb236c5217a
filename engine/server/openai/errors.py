"""Errors in OpenAI's format: a status and `{"error": {"message", "type", "param", "code"}}`.

A client decides by these whether to raise, and what, and whether to try again; so the status is part of the meaning.
The message is for a person and names field, value and what is valid. It never holds a path or a stack trace: those go
to the log, under the request's id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...errors import InputError
from ...serving import SamplingParams

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}

FIELDS = {"prompt", *SamplingParams.__dataclass_fields__}
OBJECT = re.compile(r"a valid dictionary( or instance of \w+)?")  # pydantic's words for it
SHOWN = 64  # characters of a value that is told again
RENAMED = {"json_schema": "response_format"}


class APIError(Exception):
    """Error response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """JSON body of the error."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """400: the request can never be served."""
    return APIError(400, message, param=param, code=code)


def from_input_error(error: InputError) -> APIError:
    """400 from an InputError of the engine or tokenizer; its first word may be the field."""
    message = " ".join(str(error).split())
    first = message.removeprefix("the ").split(" ", 1)[0]
    return invalid(message, RENAMED.get(first, first if first in FIELDS else None))


def from_validation(errors: Sequence[Any]) -> APIError:
    """400 from pydantic: the first wrong field, and what it could be, in one sentence."""
    first = errors[0]
    if not first["loc"]:
        return not_an_object()
    place = _place(first)
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {place}", place, "unknown_parameter")
    path = first["loc"]
    while path and not _is_name(path[-1]):
        path = path[:-1]
    several = path != first["loc"]  # a field of several types has an error for each
    same = [error for error in errors if error["loc"][: len(path)] == path] if several else [first]
    reasons = dict.fromkeys(OBJECT.sub("an object", error["msg"].removeprefix("Value error, ")) for error in same)
    given = first.get("input")
    got = f", got {given!r}" if isinstance(given, (str, int, float)) and len(str(given)) <= SHOWN else ""
    return invalid(f"{place or 'the body'}: {'; or '.join(reasons)}{got}", place)


def not_an_object() -> APIError:
    """400: the body is no JSON object, or does not say that it is one."""
    return invalid("send a JSON object, with the header content-type: application/json")


def _place(error: dict[str, Any]) -> str | None:
    """Path of a validation error in the body, without pydantic's type names."""
    return ".".join(str(part) for part in error["loc"] if _is_name(part)) or None


def _is_name(part: str | int) -> bool:
    """Return whether a part of the path is a field or an index, not a type name."""
    return isinstance(part, int) or part.isdigit() or (part.isidentifier() and part not in ("str", "int"))


def busy(seconds: int) -> APIError:
    """429: the queue is full, with Retry-After."""
    return APIError(
        429,
        f"the server is busy and its queue is full: try again in {seconds} s",
        code="queue_full",
        headers={"retry-after": str(seconds)},
    )


def unavailable(state: str) -> APIError:
    """503: no engine to serve with."""
    return APIError(503, f"the engine is {state}", code="engine_unavailable", headers={"retry-after": "2"})


def compiling() -> APIError:
    """503: too many grammars of other clients are being compiled, with Retry-After."""
    return APIError(503, "too many grammars are being compiled: try again", headers={"retry-after": "2"})


def failed() -> APIError:
    """500: the engine failed while computing the request."""
    return APIError(500, "the engine failed while computing this request", code="engine_error")


def too_slow(seconds: float) -> APIError:
    """504: the request's time limit is up."""
    message = f"the request was not finished within {seconds:g} s, the limit of this server"
    return APIError(504, message, code="request_timeout", headers={"x-should-retry": "false"})


def gone() -> APIError:
    """499 for the access log: the client left."""
    return APIError(499, "the client has closed the connection", code="client_closed_request")
