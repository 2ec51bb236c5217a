"""`warploom serve` as a user starts and stops it."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from warploom.engine.cli import main
from warploom.engine.cli.flags import parse
from warploom.engine.cli.serve import Flags, api_keys
from warploom.engine.formats.model_directory import save_model
from warploom.engine.serving.options import LLMOptions

from .conftest import make_model, make_tokenizer

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(make_model(), tmp_path_factory.mktemp("models") / "small", make_tokenizer())


def start(*flags, launcher=("-m", "warploom.engine.cli"), **environment):
    command = [sys.executable, *launcher, "serve", "--port", "0", "--no-ui", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stderr.read()
    return process, found.group()


def wait_ready(process, url):
    while httpx.get(f"{url}/health", timeout=60).status_code != 200:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def test_serve_directory_and_drain_on_signal(directory, tmp_path):
    """It serves a directory under its name and drains when told to stop."""
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfrom-file\n")
    process, url = start("--model", str(directory), "--api-key-file", str(keys), WARPLOOM_API_KEYS="one, two")
    try:
        wait_ready(process, url)
        assert url.startswith("http://127.0.0.1:"), "nobody else is let in unless told to"
        for key in ("from-file", "one", "two"):
            models = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=60).json()
            assert models["data"][0]["id"] == "small"
        body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers={"authorization": "Bearer one"}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]", "what was under way is finished"
        assert process.wait() == 130
    finally:
        process.kill()
    log = process.stderr.read()
    assert "Traceback" not in log and "from-file" not in log


def test_listening_wider_without_a_key_is_warned_about(directory):
    process, _ = start("--model", str(directory), "--host", "0.0.0.0")
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert "WARNING: whoever reaches this address can use it" in process.stderr.read()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--port", "99999"], "port must be between 0 and 65535, got 99999"),
        (["--host", "256.1.1.1"], "cannot listen at 256.1.1.1"),
        (["--replicas", "0"], "replicas must be at least 1, got 0"),
        (["--max-queue", "-1"], "max_queue must be at least 0, got -1"),
        (["--api-key-file", os.devnull], "has no key in it"),
        (["--quantize", "int3"], "'int3'"),
        (["--kv-memory", "10", "--port", "0"], "kv_memory=10 bytes is less than one page"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_2(flags, says, directory, capsys):
    flags = flags if "--model" in flags else ["--model", str(directory), *flags]
    assert main(["serve", "--no-ui", *(flags if "--port" in flags else [*flags, "--port", "0"])]) == 2
    error = capsys.readouterr().err
    assert says in error and error.splitlines()[-1].startswith("warploom serve: ")


def test_serve_refuses_unknown_choice_before_listening(directory, capsys):
    assert main(["serve", "--model", str(directory), "--port", "0", "--quantize", "int9"]) == 2
    told = capsys.readouterr()
    assert "http://" not in told.out and "int9" in told.err and len(told.err.splitlines()) == 1


def test_serve_takes_every_engine_option(directory):
    """One class says what an engine may be told: `serve` and `generate` read the same flags from it."""
    options = Flags(LLMOptions("x")).llm
    argv = ["--model", str(directory)]
    changed = {"batch_invariant": False, "prefix_cache": False, "max_batch": 7, "quantize": "int8", "device": "cpu"}
    for name, value in changed.items():
        flag = name.replace("_", "-")
        argv += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    flags = parse(Flags, [*argv, "--api-key", "one", "--api-key", "two"], "serve")
    assert flags.llm == dataclasses.replace(options, model=str(directory), **changed)
    assert api_keys(flags) == ("one", "two")


BURNING = """
import sys
from warploom.engine.serving.execution import model_runner

def burn(self, plan):
    raise RuntimeError("on fire")

model_runner.Runner.launch = burn
from warploom.engine.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_serve_exits_nonzero_when_the_engine_has_failed(directory, tmp_path):
    """Restart=on-failure then starts it again; it once lived on at 503."""
    launcher = tmp_path / "burning.py"
    launcher.write_text(BURNING)
    process, url = start("--model", str(directory), launcher=[str(launcher)])
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=10)
        assert process.wait(30) == 1
        assert "will not be restarted again" in process.stderr.read()
    finally:
        process.kill()
