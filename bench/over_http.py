"""Ours behind HTTP: `warploom serve` in a process of its own, asked by as many clients as there are requests."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .peers import Unavailable

NEEDS = ("fastapi", "uvicorn", "tyro")
PATIENCE = 180.0  # seconds for a model to load


def start(directory: str, *flags: str) -> tuple[str, Callable[[], None]]:
    """Start `warploom serve` on a free port; its address once it answers, and what ends it."""
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
    """Greedy continuations of all prompts, each asked for by a client of its own at the same time."""

    def ask(prompt: list[int], count: int) -> list[int]:
        body = {"idx": [prompt], "max_new_tokens": count, "temperature": 0.0}
        request = urllib.request.Request(
            f"{address}/generate/", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["idx"][0][len(prompt) :]

    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(ask, prompts, counts))


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
