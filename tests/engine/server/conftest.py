"""A small model behind a real server: uvicorn in a thread, a real socket, real clients."""

import os

os.environ.setdefault("LANGSMITH_TRACING", "false")
os.environ.pop("WARPLOOM_API_KEYS", None)  # of whoever runs the tests

import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.model import Transformer
from warploom.engine.server.config import ServerConfig
from warploom.engine.serving import LLM
from warploom.tokenizer import BPETokenizer

CONTEXT = 320
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\ntools: {{ tools | tojson }} answer with <tool_call>JSON</tool_call><|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

AGENT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall a tool as <tool_call>\n"
    '{"name": "…", "arguments": {…}}\n</tool_call>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}'
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>"
    "{{ 'user' if message.role == 'tool' else message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> BPETokenizer:
    """Every byte is a token, so that a random model often ends in the middle of a character."""
    specials = {token: 256 + number for number, token in enumerate(SPECIALS)}
    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, [], specials, "gpt4")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=260, d_model=32, n_layers=2, n_heads=2, max_seq_len=CONTEXT)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    return model.eval()


class HeldLLM(LLM):
    """A model whose every step takes until a test lets it through: like a large one's, however fast the machine is."""

    def __init__(self, **options):
        super().__init__(make_model(), make_tokenizer(), **options)
        self._steps, self._free = threading.Semaphore(0), False
        launch = self.engine.runner.launch

        def held_launch(plan):
            if not self._free:
                self._steps.acquire()
            return launch(plan)

        self.engine.runner.launch = held_launch

    def let(self, steps: int) -> None:
        """Let some steps through."""
        self._steps.release(steps)

    def hold(self) -> None:
        """Let none through, but as many as the test says."""
        self._free = False

    def free(self) -> None:
        """Let all steps through, from now on."""
        self._free = True
        self.let(1)


class Server:
    """A server in a thread, and what tests want to know of it."""

    def __init__(self, make, config: ServerConfig, keys=(), further=None, memory=0, **options):
        from warploom.engine.server.app import create_app
        from warploom.engine.server.http_server import HTTPServer

        self.app = create_app(make, config, keys, further=further, memory=memory)
        self.bridge = self.app.state.bridge
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._server = HTTPServer(self.app, config, self.bridge.end_flows, **options)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def start(self) -> "Server":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def pool(self):
        return self.bridge.llm.engine.scheduler.pool

    def wait(self, condition) -> None:
        """Until the condition holds; fails if it never does."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def wait_ready(self) -> "Server":
        self.wait(lambda: self.bridge.state == "ready")
        return self

    def assert_nothing_left(self) -> None:
        """No continuation is under way, and every page is free again."""
        self.wait(lambda: not self.bridge.flows and self.bridge.llm.engine.scheduler.idle)
        assert not self.bridge.open and not self.bridge.holds
        scheduler = self.bridge.llm.engine.scheduler
        self.bridge.llm.engine.call(scheduler.check)
        assert self.pool.num_free == self.pool.num_pages


@contextmanager
def serving(make=None, keys=(), max_batch: int = 16, options=None, **config):
    """A running server of its own for a test."""
    make = make or (lambda: LLM(make_model(), make_tokenizer(), max_batch=max_batch))
    config = {"name": "tiny", "log": False, "ui": False, **config}
    server = Server(make, ServerConfig(**config), keys, **(options or {})).start()
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def start(*flags, launcher=("-m", "warploom.engine.cli"), **environment):
    """`warploom serve` as a process of its own, and its address."""
    command = [sys.executable, *launcher, "serve", "--port", "0", "--no-ui", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stderr.read()
    return process, found.group()


def wait_ready(process, url):
    """Until it has loaded its model."""
    import httpx

    while httpx.get(f"{url}/health", timeout=60).status_code != 200:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server():
    """The server that most tests share."""
    with serving() as server:
        yield server


@pytest.fixture
def client(server):
    httpx = pytest.importorskip("httpx", reason="these tests need httpx")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
