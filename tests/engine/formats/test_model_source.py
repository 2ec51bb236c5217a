"""A model by its Hub id, against a stand-in of the Hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.formats.adapters import AdapterConfig, factor_names, low_rank_weights
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_info import load_config
from warploom.engine.formats.model_source import resolve_model
from warploom.engine.formats.model_writer import save_model, write_adapter
from warploom.engine.model import Transformer
from warploom.tokenizer import CharTokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from warploom.engine.formats.model_directory import load_model
from warploom.engine.serving import LLM, SamplingParams
try:
    model, tokenizer = load_model(sys.argv[1], device="cpu")
except ValueError as error:
    sys.exit(str(error))
text = LLM(sys.argv[1], device="cpu").generate("hello", SamplingParams(temperature=0, max_tokens=4)).text
print(repr(text), model.config.vocab_size, tokenizer.vocab_size)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that fetching a snapshot takes."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, files = self.path.split("?")[0].strip("/"), self.server.files
        self.server.asked.append(path)
        if not path.removeprefix("api/models/").startswith("org/tiny"):
            return self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("api/models/org/tiny/tree/"):
            return self._say(200, json.dumps([self._entry(name) for name in files]).encode())
        if path.startswith("api/models/"):
            siblings = [{"rfilename": name} for name in files]
            return self._say(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        name = path.split("/", 4)[-1]
        if name not in files:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        etag = hashlib.sha1(files[name]).hexdigest()
        return self._say(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _entry(self, name):
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _say(self, code, body, headers=()):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train(["hello world"])
    shape = dict(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, max_seq_len=32)
    save_model(Transformer(ModelConfig(**shape)), tmp_path / "model", tokenizer)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    server.files |= {"pytorch_model.bin": b"twice", "onnx/model.onnx": b"other", "README.md": b"words"}
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(hub, home, name, **env):
    place = f"http://127.0.0.1:{hub.server_address[1]}"
    env = {**os.environ, "HF_ENDPOINT": place, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **env}
    return subprocess.run([sys.executable, "-c", ASK, name], env=env, capture_output=True, text=True, timeout=120)


def test_hub_id_opens_and_stays(hub, tmp_path):
    first = ask(hub, tmp_path / "home", "org/tiny")
    assert first.returncode == 0, first.stderr
    fetched = {path.rsplit("/", 1)[-1] for path in hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "model.onnx", "README.md"}
    asked = len(hub.asked)
    again = ask(hub, tmp_path / "home", "org/tiny", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert len(hub.asked) == asked


def test_hub_id_by_revision(hub, tmp_path):
    assert ask(hub, tmp_path / "home", "org/tiny@v1.0").returncode == 0
    assert any("v1.0" in path for path in hub.asked)


def test_hub_id_of_an_adapter_opens_with_its_base(hub, tmp_path):
    weights = low_rank_weights(load_config(tmp_path / "model"), "llama")
    a, b = factor_names(weights[0].layers[0])
    factors = {a: torch.ones(2, 32), b: torch.ones(weights[0].sizes[0], 2)}
    config = AdapterConfig(str(tmp_path / "model"), 2, 4)
    write_adapter(config, load_config(tmp_path / "model"), "llama", factors.items(), tmp_path / "adapter")
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    said = ask(hub, tmp_path / "home", "org/tiny")
    assert said.returncode == 0, said.stderr
    assert any(path.endswith("adapter_model.safetensors") for path in hub.asked)


@pytest.mark.parametrize(
    ("name", "env", "sentence"),
    [
        ("org/nothing", {}, "org/nothing is neither a directory here nor a model on the Hub"),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "not in the Hub's cache, and HF_HUB_OFFLINE is set"),
        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
    ],
)
def test_hub_refusal_is_one_sentence(hub, tmp_path, name, env, sentence):
    said = ask(hub, tmp_path / "home", name, **env)
    assert said.returncode == 1 and sentence in said.stderr.strip().splitlines()[-1]


def test_name_that_is_nothing_is_refused(tmp_path):
    for name in ("nowhere", tmp_path / "a" / "b" / "c", "a/b.gguf"):
        with pytest.raises(ValueError, match=r"is not a directory, a .* file or a Hub id"):
            resolve_model(name)
    with pytest.raises(ValueError, match=r"is not a directory, a .* file or a Hub id"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "model.gguf").touch()
    assert resolve_model(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"model\.gguf"):
        load_config(tmp_path / "model.gguf")
