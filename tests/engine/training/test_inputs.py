"""Token files of a run, made of what it names."""

import json

import pytest

from warploom.engine import throttle
from warploom.engine.training import inputs
from warploom.engine.training.config import TrainConfig

ROWS = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}] * 20


@pytest.mark.parametrize("name", ["novel.txt", "chats.jsonl"])
def test_long_tokenization_reports_bytes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(throttle, "EVERY", -1.0)
    path = tmp_path / name
    path.write_text("a b c\n" * 200 if name == "novel.txt" else "\n".join(map(json.dumps, ROWS)))
    notes: list[str] = []
    config = TrainConfig(data=str(path), out=str(tmp_path / "run"), tokenizer="char")
    made = inputs.prepare(config, notes.append)
    reports = [note for note in notes if note.startswith(f"tokenizing {made.data.meta.source}: ")]
    assert reports and reports[-1].endswith(" bytes")
