"""Batch files in OpenAI's format, answered as a server would."""

import json

import pytest

from warploom.engine.cli import main
from warploom.engine.formats.model_writer import save_model

from .conftest import make_model, make_tokenizer

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


def test_batch_file_is_answered_and_resumed(tmp_path, capsys):
    directory = save_model(make_model(), tmp_path / "small", make_tokenizer())
    batch, out = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    hi = [{"role": "user", "content": "hi"}]
    asks = {
        "a": ("/v1/completions", {"model": "gpt-x", "prompt": "x", "max_tokens": 4, "seed": 1}),
        "b": ("/v1/chat/completions", {"model": "small", "messages": hi, "max_tokens": 4, "n": 2}),
        "c": ("/v1/completions", {"prompt": "x", "tempreture": 1}),
        "d": ("/v1/embeddings", {"model": "text-embedding-3", "input": ["x", "y"], "pooling": "last"}),
        "e": ("/v1/score", {"text_1": "x", "text_2": ["x", "y"]}),
        "f": ("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}),
    }
    lines = [{"custom_id": i, "method": "POST", "url": url, "body": body} for i, (url, body) in asks.items()]
    batch.write_text("\n".join(map(json.dumps, lines)))
    command = ["generate", "--model", str(directory), "--batch", str(batch), "--out", str(out)]
    assert main(command) == 1 and "1 of 6 requests" in capsys.readouterr().err
    told = {line["custom_id"]: line["response"] for line in map(json.loads, out.read_text().splitlines())}
    assert {name: response["status_code"] for name, response in told.items()} == dict.fromkeys("abdef", 200) | {
        "c": 400
    }
    assert told["a"]["body"]["usage"]["completion_tokens"] <= 4 and len(told["b"]["body"]["choices"]) == 2
    vectors = [each["embedding"] for each in told["d"]["body"]["data"]]
    assert [len(vector) for vector in vectors] == [32, 32] and told["d"]["body"]["model"] == "text-embedding-3"
    assert told["e"]["body"]["data"][0]["score"] == pytest.approx(1)
    batch.write_text("\n".join(map(json.dumps, lines[:2] + lines[3:])))
    assert main(command) == 0 and len(out.read_text().splitlines()) == 6, "what is answered is not asked again"
    batch.write_text(json.dumps({"custom_id": "a", "url": "/v1/nothing", "body": {}}))
    assert main(command) == 2 and "url must be one of" in capsys.readouterr().err
    batch.write_text(json.dumps({**lines[0], "custom_id": "z"}))
    assert main([*command, "--kv-memory", "10"]) == 2
    assert "kv_memory=10 bytes is less than one page" in capsys.readouterr().err, "why it could not be opened"
