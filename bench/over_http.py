"""Our server over HTTP: `warploom serve` in its own process, with one client per request.

The clients have to share the machine with the server, so they are frugal: whole answers by `/generate/`, streams read
as they come and taken apart at the end.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from .peers import Unavailable

NEEDS = ("fastapi", "uvicorn", "tyro")
PATIENCE = 180.0  # seconds for a model to load


def start(directory: str, *flags: str) -> tuple[str, Callable[[], None]]:
    """Start `warploom serve` on a free port; return its address once it answers, and a function that ends it."""
    if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise Unavailable(f"{' and '.join(absent)} not installed")
    command = [sys.executable, "-m", f"{__package__.rpartition('.')[0]}.engine.cli", "serve", "--model", directory]
    command += ["--port", "0", "--no-ui", "--no-log", *flags]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the server)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

    def stop() -> None:
        process.terminate()
        process.wait()
        process.stdout.close()
        errors.close()

    try:
        address = process.stdout.readline().rpartition(" ")[2].strip()
        _await_health(address, process)
    except Exception:
        process.terminate()
        process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["it ended without a word"]
        stop()
        raise RuntimeError(said[-1]) from None
    return address, stop


def generate_all(address: str, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Greedy continuations of all prompts, requested concurrently."""

    def ask(prompt: list[int], count: int) -> list[int]:
        body = {"idx": [prompt], "max_new_tokens": count, "temperature": 0.0}
        request = urllib.request.Request(
            f"{address}/generate/", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["idx"][0][len(prompt) :]

    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(ask, prompts, counts))


def stream_all(address: str, prompts: list[list[int]], counts: list[int]) -> list[tuple[str, int]]:
    """The same as streams: text and number of tokens of each."""
    host, port = address.removeprefix("http://").split(":")

    async def ask(prompt: list[int], count: int) -> tuple[str, int]:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
        data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        head = "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.format(len(data)).encode() + data)
        answer = b"".join([part async for part in _parts(reader)]).decode()
        writer.close()
        events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        return text, events[-1]["usage"]["completion_tokens"]

    async def ask_all() -> list[tuple[str, int]]:
        return await asyncio.gather(*map(ask, prompts, counts))

    return asyncio.run(asyncio.wait_for(ask_all(), PATIENCE))


async def _parts(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(1 << 20):
        yield part


def _await_health(address: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None:
                raise
            time.sleep(0.05)
    raise TimeoutError(f"{address} did not answer")
