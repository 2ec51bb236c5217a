"""`warploom serve`: an OpenAI-compatible HTTP server for a model."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ...tokenizer.sources import read_text
from ..errors import InputError
from ..server.config import ServerConfig
from ..serving.options import LLMOptions
from .flags import parse
from .model_argument import ModelOptions, model_first

if TYPE_CHECKING:
    from ..formats.adapters import Adapter

UNIX = getattr(socket, "AF_UNIX", None)  # not on Windows
KEYS = "WARPLOOM_API_KEYS"


@dataclass(frozen=True)
class Flags:
    """An OpenAI-compatible server for one model, with a playground page."""

    llm: ModelOptions
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIR: a LoRA adapter of the model, once for each; requests name it as their model. Many share one batch."""
    further_model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIR: another model, once for each: loaded when it is first asked for, with the options of the first."""
    model_memory: int | None = None
    """Bytes for the weights and pages of all models; the least recently used of the further ones is unloaded for
    another. By default four fifths of what is free. Without kv_memory each has an eighth of it for pages."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every one this machine has."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that clients may use, once for each; others can read it in the list of processes: prefer the next flag."""
    api_key_file: Path | None = None
    """A file with a key a line (# begins a comment). The environment's WARPLOOM_API_KEYS, with commas, adds to it."""
    uds: Path | None = None
    """Listen at this Unix domain socket instead, for this user alone."""
    ssl_certfile: Path | None = None
    """A certificate (PEM): speak TLS."""
    ssl_keyfile: Path | None = None
    """The certificate's private key."""
    root_path: str = ""
    """Path prefix under which a reverse proxy publishes this server, such as /llm."""
    chat_template: Path | None = None
    """A Jinja file to use instead of the model's own chat template."""
    replicas: int = 1
    """Data-parallel replicas, through Ray Serve (needs warploom[cluster]); on a GPU machine, one a GPU."""
    server: Annotated[ServerConfig, tyro.conf.arg(name="")] = field(default_factory=ServerConfig)


def run(argv: list[str]) -> int:
    flags = parse(Flags, model_first(argv), "serve")
    try:
        from ..server.app import create_app
        from ..server.http_server import HTTPServer, log_without_blocking, raise_file_limit
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'warploom[serve]'") from None

    if flags.replicas < 1:
        raise InputError(f"replicas must be at least 1, got {flags.replicas}")
    config, keys = named(flags), api_keys(flags)
    refuse_early(flags, config)
    tuned = open_early(flags)
    options = transport(flags)
    listener = listen(flags.host, flags.port) if flags.uds is None else listen_local(flags.uds)
    if not keys and listener.family != UNIX and _is_loopback(listener) and not config.allowed_hosts:
        config = replace(config, allowed_hosts=("localhost",))
    flags, further, memory = further_models(flags)
    loader = Loader(flags, config, len(keys), tuned)
    log_without_blocking()
    raise_file_limit()
    if flags.replicas == 1:
        app = create_app(loader, config, keys, loader.stop, further, memory)
        end_streams = app.state.bridge.end_flows
    else:
        app, end_streams = front(loader, config, keys)
    server = loader.server = HTTPServer(app, config, end_streams, **options)
    where = address_of(listener, secure=flags.ssl_certfile is not None)
    if not keys and not _is_loopback(listener):
        print("warploom: WARNING: whoever reaches this address can use it; set --api-key-file", file=sys.stderr)
    print(f"warploom: {config.name} at {where}", flush=True)
    share_the_interpreter()
    server.run(sockets=[listener])
    if loader.error:
        raise loader.error
    return int(loader.failed)


def share_the_interpreter() -> None:
    """Keep the event loop's waits for Python's lock short: the engine, the tokenizer and the parser run beside it.

    A full collection stops all of them, and takes 120 ms for what the imports have made, which is frozen here. A
    thread that computes gives the lock up when another has waited for the switch interval, and a request waits at
    each of its system calls: 1 ms instead of 5 halves the slowest of /health's answers beside bodies of 4 MB."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.001)


def refuse_early(flags: Flags, config: ServerConfig) -> None:
    """Refuse what can be checked before the server listens."""
    from ..device import pick_device
    from ..formats.model_info import check_model

    llm, own, further = flags.llm, adapters(flags), directories(flags.further_model, "further_model")
    llm.check()
    for source in (llm.model, *([llm.draft_model] if llm.draft_model else []), *further.values()):
        check_model(source)
    template_of(flags)
    if flags.replicas == 1:  # else on other machines, perhaps
        pick_device(llm.device)
    taken = set(config.names)
    for flag, names in (("adapter", own), ("further_model", further)):
        if both := taken & names.keys():
            raise InputError(f"{flag} {min(both)!r} has the name of another model: choose another")
        taken |= names.keys()
    if config.prompt_cache is None:
        return
    if flags.replicas > 1 or own or llm.draft_model or llm.tensor_parallel > 1:
        raise InputError("prompt_cache needs a model in one process, without replicas, draft_model and adapters")
    try:
        config.prompt_cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"prompt_cache {config.prompt_cache}: {error.strerror or error}") from None


def open_early(flags: Flags) -> Mapping[str, str | Adapter]:
    """The adapters by name, held against their model; their directories where its files are still to be fetched."""
    from ..serving.execution.lora import open_adapters

    own, model = adapters(flags), Path(flags.llm.model)
    return open_adapters(own, model) if model.exists() else own


class Loader:
    """Loads the engine; an error in the flags that only shows then stops the server."""

    def __init__(self, flags: Flags, config: ServerConfig, keys: int, tuned: Mapping[str, str | Adapter]) -> None:
        self.flags, self.config, self.keys, self.tuned = flags, config, keys, tuned
        self.server: Any = None
        self.error: ValueError | None = None
        self.failed = False

    def __call__(self) -> Any:
        try:
            llm = open_model(self.flags.llm, self.tuned, template_of(self.flags))
            print(f"warploom: {described(llm)}, {self.keys or 'no'} keys", flush=True)
            return llm
        except InputError as error:
            self.give_up(error)
            raise

    def give_up(self, error: InputError) -> None:
        """Stop the server: there is nothing to serve."""
        self.error = error
        self.stop()

    def stop(self) -> None:
        """Exit with an error code: the engine has failed for good."""
        self.failed = self.server.should_exit = True


def front(loader: Loader, config: ServerConfig, keys: tuple[str, ...]) -> tuple[Any, Callable[[], None]]:
    """Make the proxy application over replicas, and a function that ends its streams."""
    flags = loader.flags
    try:
        from ..server.cluster.proxy import create_front
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'warploom[cluster]'") from None
    from ..formats.model_source import resolve_model

    options = replace(flags.llm, model=str(resolve_model(flags.llm.model).resolve()))
    gpus = (options.device or "auto").partition(":")[0] in ("auto", "cuda")
    make = partial(open_model, options, adapters(flags), template_of(flags))
    return create_front(make, config, keys, flags.replicas, gpus, loader.give_up)


def open_model(options: LLMOptions, adapters: Mapping[str, str | Adapter], template: str | None) -> Any:
    """Load the model, with another chat template if given."""
    llm = options.open(adapters)
    if template is not None and llm.tokenizer is not None:
        llm.tokenizer.chat_template = template
    return llm


def further_models(flags: Flags) -> tuple[Flags, dict[str, Any], int]:
    """The further models, the flags with every model's memory share, and what the first leaves."""
    if flags.replicas > 1 and flags.further_model:
        raise InputError(f"replicas must be 1 with further_model, got {flags.replicas}")
    if not flags.further_model:
        return flags, {}, 0
    from ..formats.model_info import load_config
    from ..memory import available_memory
    from ..server.model_pool import FurtherModel

    memory = flags.model_memory or int(available_memory("cpu") * 0.8)
    pages = flags.llm.kv_memory or memory // 8  # of each model
    options = replace(flags.llm, kv_memory=pages)
    flags, found = replace(flags, llm=options), {}
    for name, source in directories(flags.further_model, "further_model").items():
        most = options.max_seq_len and min(options.max_seq_len, load_config(source).max_seq_len)
        mine = replace(options, model=source, max_seq_len=most)
        found[name] = FurtherModel(partial(open_model, mine, {}, None), model_size(source) + pages)
    left = memory - model_size(options.model) - pages
    return flags, found, max(left, 0)


def model_size(source: str) -> int:
    """Bytes of a model's weight files."""
    from ..formats.model_source import resolve_model

    path = resolve_model(source)
    files = path.iterdir() if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.suffix in (".safetensors", ".gguf", ".bin"))


def template_of(flags: Flags) -> str | None:
    """The chat template of `--chat-template`, checked to compile."""
    if flags.chat_template is None:
        return None
    from ...tokenizer.chat import compile_template

    template = text_of(flags.chat_template, "chat_template")
    compile_template(template)
    return template


def text_of(path: Path, flag: str) -> str:
    """Read the text file that a flag names."""
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror or error}") from None


def described(llm: Any) -> str:
    """Describe in one line what is served."""
    from ..serving.execution.kv_cache import HAS_NATIVE

    scheduler, model, runner = llm.engine.scheduler, llm.model, llm.engine.runner
    pages, size = scheduler.pool.num_pages, scheduler.pool.page_size
    device = model.device.type
    executor = "C++" if device == "cpu" and HAS_NATIVE else "Triton" if device == "cuda" else "PyTorch"
    dtype = getattr(getattr(runner, "store", None), "dtype", None)
    stored = "" if dtype is None else f", keys and values in {str(dtype).removeprefix('torch.')}"
    return (
        f"ready on {device} ({executor}{stored}): context {llm.max_seq_len:,}, {pages:,} pages of {size} tokens "
        f"({pages * size:,} in all), {scheduler.max_batch} sequences a batch, "
        f"{scheduler.max_batch_tokens} tokens a step"
    )


def transport(flags: Flags) -> dict[str, Any]:
    """uvicorn options for TLS and the root path."""
    if (flags.ssl_certfile is None) != (flags.ssl_keyfile is None):
        raise InputError("ssl_certfile and ssl_keyfile go together: give both")
    for name in ("ssl_certfile", "ssl_keyfile"):
        file = getattr(flags, name)
        if file is not None and not file.is_file():
            raise InputError(f"{name} {file} is not a file")
    if flags.ssl_certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(flags.ssl_certfile, flags.ssl_keyfile)
        except OSError as error:
            pair = f"ssl_certfile {flags.ssl_certfile} and ssl_keyfile {flags.ssl_keyfile}"
            raise InputError(f"{pair} are no pair in PEM: {error.strerror or error}") from None
    if flags.root_path and not flags.root_path.startswith("/"):
        raise InputError(f"root_path must begin with /, got {flags.root_path!r}")
    options: dict[str, Any] = {"root_path": flags.root_path.rstrip("/")}
    if flags.ssl_certfile is not None:
        options |= {"ssl_certfile": str(flags.ssl_certfile), "ssl_keyfile": str(flags.ssl_keyfile)}
    return options


def address_of(listener: socket.socket, secure: bool) -> str:
    """URL of a listening socket."""
    if listener.family == UNIX:
        return f"unix:{listener.getsockname()}"
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    return f"{'https' if secure else 'http'}://{shown}:{port}"


def adapters(flags: Flags) -> dict[str, str]:
    """Adapter directories by name."""
    return directories(flags.adapter, "adapter")


def directories(given: tuple[str, ...], flag: str) -> dict[str, str]:
    """Parse a repeatable flag NAME=DIR."""
    pairs = [each.partition("=") for each in given]
    for each, (name, _, directory) in zip(given, pairs):
        if not name or not directory:
            raise InputError(f"{flag} must be NAME=DIR, got {each!r}")
    found = {name: directory for name, _, directory in pairs}
    if len(found) < len(pairs):
        raise InputError(f"{flag}: two have the same name: {', '.join(given)}")
    return found


def named(flags: Flags) -> ServerConfig:
    """The server's configuration, with the model's name filled in."""
    if not all(flags.server.served_model_name):
        raise InputError("served_model_name must not be empty: leave it out for the directory's name")
    names = (*flags.server.served_model_name, Path(flags.llm.model).resolve().name)
    return replace(flags.server, name=flags.server.name or names[0])


def _is_loopback(listener: socket.socket) -> bool:
    return listener.family == UNIX or ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def api_keys(flags: Flags) -> tuple[str, ...]:
    """API keys from flags, file and environment."""
    if not all(key.strip() for key in flags.api_key):
        raise InputError("api_key must not be empty: leave it out to serve without keys")
    keys = [*flags.api_key, *os.environ.get(KEYS, "").split(",")]
    if flags.api_key_file is not None:
        lines = text_of(flags.api_key_file, "api_key_file").splitlines()
        written = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(written):
            raise InputError(f"api_key_file {flags.api_key_file} has no key in it")
        keys += written
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))


def listen_local(path: Path) -> socket.socket:
    """Listen at a Unix socket, for this user only."""
    if UNIX is None:
        raise InputError("uds: this system has no Unix domain sockets")
    try:
        if path.is_socket():
            path.unlink()  # what a killed server left
        listener = socket.socket(UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(2048)
    except OSError as error:
        raise InputError(f"cannot listen at {path}: {error.strerror or error}") from None
    return listener


def listen(host: str, port: int) -> socket.socket:
    """Listen at a TCP port."""
    if not 0 <= port <= 65535:
        raise InputError(f"port must be between 0 and 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while attempting")[0]
        raise InputError(f"cannot listen at {host}:{port}: {why}") from None
