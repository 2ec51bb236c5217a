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
from warploom.engine.cli.model_argument import ModelOptions
from warploom.engine.cli.serve import Flags, api_keys
from warploom.engine.formats.model_writer import save_model

from .conftest import make_model, make_tokenizer, start, wait_ready

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(make_model(), tmp_path_factory.mktemp("models") / "small", make_tokenizer())


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
        (["--max-seq-len", "400"], "max_seq_len is 400; the model reads at most 320 tokens"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_2(flags, says, directory, capsys):
    flags = flags if "--model" in flags else ["--model", str(directory), *flags]
    assert main(["serve", "--no-ui", *(flags if "--port" in flags else [*flags, "--port", "0"])]) == 2
    error = capsys.readouterr().err
    assert says in error and error.splitlines()[-1].startswith("warploom serve: ")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--quantize", "int9"], "int9"),
        (["--max-model-len", "128"], "--max-model-len is --max-seq-len here"),
        (["--model", "EMPTY"], "has no weights"),
        (["--adapter", "x=nowhere"], "adapter 'x': nowhere is not a directory"),
        (["--adapter", "x=EMPTY"], "it has no adapter_config.json"),
        (["--further-model", "x=EMPTY"], "has no weights"),
        (["--draft-model", "nowhere"], "nowhere is not a directory"),
        (["--chat-template", "nowhere"], "chat_template nowhere: No such file"),
        (["--chat-template", "FILE"], "the chat template does not compile"),
        (["--ssl-certfile", "FILE", "--ssl-keyfile", "FILE"], "are no pair in PEM"),
        (["--api-key-file", "nowhere"], "api_key_file nowhere: No such file"),
        (["--api-key", ""], "api_key must not be empty"),
        (["--served-model-name", ""], "served_model_name must not be empty"),
        (["--prompt-cache", "FILE"], "prompt_cache FILE: "),
        (["--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (["--device", "tpu"], "device 'tpu' is not known"),
    ],
)
def test_serve_refuses_before_listening(flags, says, directory, tmp_path, monkeypatch, capsys):
    """A wrong flag is one sentence, and nobody has met a server that ends a second later."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "config.json").write_text((directory / "config.json").read_text())
    (tmp_path / "FILE").write_text("{% if %}")
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--model", str(directory), "--port", "0", *flags]) == 2
    told = capsys.readouterr()
    assert "http://" not in told.out and says in told.err and len(told.err.splitlines()) == 1


def test_serve_takes_every_engine_option(directory):
    """One class says what an engine may be told: `serve` and `generate` read the same flags from it."""
    options = Flags(ModelOptions("x")).llm
    argv = [str(directory)]
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


def test_start_line_says_what_is_served(directory):
    process, url = start("--model", str(directory), "--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y")
    try:
        line = process.stdout.readline()
        assert "context 320" in line and "pages of 16 tokens" in line and "256 sequences a batch" in line
        assert "on cpu (" in line and line.endswith("2 keys\n")
        wait_ready(process, url)
        assert httpx.head(f"{url}/health", timeout=60).status_code == 200
        client = httpx.Client(base_url=url, headers={"authorization": "Bearer a"}, timeout=60)
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["x", "y"]
        assert client.get("/version").json()["version"]
        for name, status in (("x", 200), ("y", 200), ("small", 404)):
            body = {"model": name, "prompt": "x", "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == status
    finally:
        process.kill()


def test_unix_socket_and_template_of_a_file(directory, tmp_path):
    template, path = tmp_path / "own.jinja", tmp_path / "w.sock"
    template.write_text("{{ messages[0].content }}!")
    command = [sys.executable, "-m", "warploom.engine.cli", "serve", "--no-ui", "--model", str(directory)]
    command += ["--uds", str(path), "--chat-template", str(template), "--root-path", "/llm"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f"unix:{path}" in process.stdout.readline()
        assert path.stat().st_mode & 0o077 == 0
        client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=60)
        while client.get("/health", headers={"host": "localhost"}).status_code != 200:
            assert process.poll() is None, process.stderr.read()
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/tokenize", json=body, headers={"host": "localhost"}).json()["tokens"] == list(b"hi!")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not path.exists()
    finally:
        process.kill()


def test_tls_pair_is_spoken(directory, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
        "-keyout",
    ]
    try:
        subprocess.run([*made, str(key), "-out", str(cert)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    assert main(["serve", "--model", str(directory), "--port", "0", "--ssl-certfile", str(cert)]) == 2
    command = [
        sys.executable,
        "-m",
        "warploom.engine.cli",
        "serve",
        "--no-ui",
        "--model",
        str(directory),
        "--port",
        "0",
    ]
    command += ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"https://\S+", process.stdout.readline()).group()
        with httpx.Client(verify=False, timeout=60) as client:
            assert client.get(f"{url}/health").status_code in (200, 503)
    finally:
        process.kill()
