"""Put a model behind HTTP. `warploom serve --model DIR`, then http://127.0.0.1:8000."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...tokenizer.sources import read_text
from ..errors import InputError
from ..server.config import ServerConfig
from ..serving.options import LLMOptions
from .flags import parse

KEYS = "WARPLOOM_API_KEYS"


@dataclass(frozen=True)
class Flags:
    """An OpenAI-compatible server for one model, with a playground page."""

    llm: LLMOptions
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIR: a LoRA adapter of the model, once for each; requests name it as their model. Many share one batch."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every one this machine has."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that clients may use, once for each; others can read it in the list of processes: prefer the next flag."""
    api_key_file: Path | None = None
    """A file with a key a line (# begins a comment). The environment's WARPLOOM_API_KEYS, with commas, adds to it."""
    replicas: int = 1
    """Engines to spread the requests over, through Ray Serve (needs warploom[cluster]); on a GPU machine, one a GPU."""
    server: Annotated[ServerConfig, tyro.conf.arg(name="")] = field(default_factory=ServerConfig)


def run(argv: list[str]) -> int:
    flags = parse(Flags, argv, "serve")
    try:
        from ..server.app import create_app
        from ..server.http_server import HTTPServer, log_without_blocking, raise_file_limit
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'warploom[serve]'") from None
    from ..formats.model_directory import load_config

    if flags.replicas < 1:
        raise InputError(f"replicas must be at least 1, got {flags.replicas}")
    load_config(flags.llm.model)  # a wrong directory is told at once, before the server listens
    config, keys = named(flags), api_keys(flags)
    if config.name in adapters(flags):
        raise InputError(f"adapter {config.name!r} has the name of the model: choose another")
    listener = listen(flags.host, flags.port)
    if not keys and _is_loopback(listener) and not config.allowed_hosts:
        config = replace(config, allowed_hosts=("localhost",))
    loader = Loader(flags)
    log_without_blocking()
    raise_file_limit()
    if flags.replicas == 1:
        app = create_app(loader, config, keys, loader.stop)
        end_streams = app.state.bridge.end_flows
    else:
        app, end_streams = front(loader, config, keys)
    server = loader.server = HTTPServer(app, config, end_streams)
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    if not keys and not _is_loopback(listener):
        print("warploom: WARNING: whoever reaches this address can use it; set --api-key-file", file=sys.stderr)
    print(f"warploom: {config.name} at http://{shown}:{port}", flush=True)
    server.run(sockets=[listener])
    if loader.error:
        raise loader.error
    return int(loader.failed)


class Loader:
    """Builds the engine; a mistake in the flags that shows only then stops the server."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.server: Any = None
        self.error: ValueError | None = None
        self.failed = False

    def __call__(self) -> Any:
        try:
            return self.flags.llm.open(adapters(self.flags))
        except InputError as error:
            self.give_up(error)
            raise

    def give_up(self, error: InputError) -> None:
        """There is nothing to serve."""
        self.error = error
        self.stop()

    def stop(self) -> None:
        """The engine has failed for good: the process ends with an exit code that says so."""
        self.failed = self.server.should_exit = True


def front(loader: Loader, config: ServerConfig, keys: tuple[str, ...]) -> tuple[Any, Callable[[], None]]:
    """The application that hands requests on to replicas, each of which loads the model; what ends its streams."""
    flags = loader.flags
    try:
        from ..server.cluster.proxy import create_front
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'warploom[cluster]'") from None
    from ..formats.model_source import resolve_model

    options = replace(flags.llm, model=str(resolve_model(flags.llm.model).resolve()))
    gpus = (options.device or "auto").partition(":")[0] in ("auto", "cuda")
    return create_front(partial(options.open, adapters(flags)), config, keys, flags.replicas, gpus, loader.give_up)


def adapters(flags: Flags) -> dict[str, str]:
    """The directories of adapters by name."""
    pairs = [given.partition("=") for given in flags.adapter]
    for given, (name, _, directory) in zip(flags.adapter, pairs):
        if not name or not directory:
            raise InputError(f"adapter must be NAME=DIR, got {given!r}")
    return {name: directory for name, _, directory in pairs}


def named(flags: Flags) -> ServerConfig:
    """The server's configuration, with a name for the model."""
    return replace(flags.server, name=flags.server.name or Path(flags.llm.model).resolve().name)


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def api_keys(flags: Flags) -> tuple[str, ...]:
    """The keys from the flags, the file and the environment."""
    keys = [*flags.api_key, *os.environ.get(KEYS, "").split(",")]
    if flags.api_key_file is not None:
        lines = read_text(flags.api_key_file).splitlines()
        written = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(written):
            raise InputError(f"api_key_file {flags.api_key_file} has no key in it")
        keys += written
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket."""
    if not 0 <= port <= 65535:
        raise InputError(f"port must be between 0 and 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
