"""Token files of a run, made of what it names."""

import dataclasses
import json

import pytest

from warploom.engine import throttle
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer
from warploom.engine.training import inputs
from warploom.engine.training.callbacks import ConsoleLogger
from warploom.engine.training.config import TrainConfig
from warploom.engine.training.trainer import Trainer

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


@pytest.mark.parametrize(
    ("words", "tokens", "told"),
    [
        (30, 128, "rows of 128 tokens; the model reads 4,096, the longest of 18 documents has 88"),
        (2000, 1024, "18 of 18 documents are cut, --context 4028 takes as much as the model can"),
    ],
)
def test_default_context_fits_longest_conversation(words, tokens, told, tmp_path, capsys):
    """A published model reads 8,192 tokens and more: rows of that are padding, and a CPU takes minutes a step."""
    chats = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": " ".join("c" * words)}
    chats.write_text("\n".join([json.dumps({"messages": [ROWS[0]["messages"][0], answer]})] * 20))
    small = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 4096}
    base = TrainConfig(
        data=str(chats), out=str(tmp_path / "base"), tokenizer="char", model=small, steps=1, batch_size=1
    )
    assert Trainer(base, []).state.context == 4096, "a new model's rows are its own"
    run_start = dataclasses.replace(base, init_from=str(save_base(base)), out=str(tmp_path / "run"), model=None)
    assert Trainer(run_start, [ConsoleLogger()]).state.context == tokens
    said = capsys.readouterr()
    assert told in said.err + said.out
    asked = dataclasses.replace(run_start, context=64, out=str(tmp_path / "asked"))
    assert Trainer(asked, [ConsoleLogger()]).state.context == 64 and "rows of" not in "".join(capsys.readouterr())


def save_base(config):
    made = inputs.prepare(config, print)
    return save_model(Transformer(made.model), f"{config.out}-model", made.tokenizer)
