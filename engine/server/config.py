"""Server configuration, from which the flags of `warploom serve` are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Limits, keys and names of a server."""

    name: str = ""
    """The model's name in requests; those that name another one get 404. Empty: its directory's name."""
    served_model_name: tuple[str, ...] = ()
    """The model's names in requests, the first of which is shown; as name, and several."""
    max_queue: int = 256
    """Maximum length of the queue, in continuations; beyond that, requests get 429."""
    request_timeout: float = 600.0
    """Seconds a request may take, waiting included."""
    drain_timeout: float = 30.0
    """Graceful shutdown: seconds that requests in progress get to finish."""
    stall_timeout: float = 300.0
    """Seconds without any progress after which the engine counts as dead."""
    max_body_bytes: int = 4 << 20
    """Maximum bytes of a request's body; beyond that, 413."""
    max_tokens: int | None = None
    """Maximum tokens a request may generate; None: as many as the context holds."""
    model_defaults: bool = True
    """Take temperature, top_p, top_k, min_p and repetition_penalty that a request leaves open from the model's
    generation_config.json."""
    lenient: bool = False
    """Ignore fields of a request that are unknown or cannot be honored, and name them in the header
    x-warploom-ignored, instead of refusing the request."""
    cors_origins: tuple[str, ...] = ()
    """CORS: web origins whose pages may call this server from a browser; none by default."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are served, besides addresses; none: any, but only localhost on 127.0.0.1 and ::1
    without keys, where the page of a stranger could else reach the server under its own name (DNS rebinding)."""
    prompt_cache: Path | None = None
    """Directory in which the prefix cache is saved over a restart, for each model a file of a gigabyte at most. It
    contains what people have asked."""
    ui: bool = True
    """The playground page at / (needs gradio)."""
    log: bool = True
    """Write a line of JSON to stderr for each request."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model."""
        return tuple(dict.fromkeys(name for name in (self.name, *self.served_model_name) if name))

    def __post_init__(self) -> None:
        lowest = {
            "max_queue": 0,
            "request_timeout": 0.001,
            "drain_timeout": 0,
            "stall_timeout": 1,
            "max_body_bytes": 1024,
        }
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, or None for no limit, got {self.max_tokens}")
