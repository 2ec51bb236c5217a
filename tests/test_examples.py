"""The scripts of docs/examples, run at tiny sizes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
TINY = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 64, "vocab_size": 300}


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "novel.txt").write_text("The empire, long divided, must unite. " * 400)
    text = example("train_on_a_text").main(str(folder / "novel.txt"), str(folder / "novel"), steps=3, **TINY)
    assert text
    return folder / "novel"


def test_examples_are_all_listed():
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.name})" in listed for path in EXAMPLES.glob("*.py"))


def test_example_serve_and_ask_answers(model, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for tries_left in (2, 1, 0):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        try:
            assert isinstance(example("serve_and_ask").main(str(model), port), str)
            break
        except SystemExit:  # somebody else may have taken the port meanwhile
            assert tries_left


def test_example_fine_tune_answers(model, tmp_path):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The empire."}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    main = example("fine_tune_on_conversations").main
    assert isinstance(main(str(model), str(tmp_path / "chats.jsonl"), str(tmp_path / "chat"), epochs=1), str)


def test_example_kernel_is_right():
    """In a process of its own: an op is registered where it is made."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = [sys.executable, str(EXAMPLES / "add_a_kernel.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
