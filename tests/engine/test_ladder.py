"""The ladder: one idea a rung, the same data and budget for all, nothing trained twice."""

import json

import pytest

from warploom.engine.cli import ladder, main
from warploom.engine.config import ModelConfig

SMALL = ["--steps", "2", "--context", "8", "--batch-size", "2", "--d-model", "16", "--n-layers", "1", "--n-heads", "2"]


def climb(corpus, out, *rungs):
    flags = [*SMALL, "--tokenizer", "char", "--device", "cpu", "--out", str(out), "--rungs", *rungs]
    return main(["ladder", str(corpus), *flags])


def test_each_rung_changes_only_what_it_says():
    models = list(ladder.architectures(ladder.Flags()).values())
    for below, model, rung in zip(models, models[1:], ladder.RUNGS[1:]):
        changed = {name for name in model if model[name] != below.get(name, getattr(ModelConfig(1), name))}
        assert changed == set(rung.changes), rung.name


def test_all_rungs_cost_a_token_about_as_many_parameters():
    models = ladder.architectures(ladder.Flags()).values()
    active = [ModelConfig(vocab_size=1024, **model).parameter_count(active=True) for model in models]
    assert max(active) < 1.1 * min(active)


def test_ladder_second_climb_trains_new_rungs(tmp_path, capsys):
    """The ladder ends with a table and a second climb trains only new rungs."""
    corpus, out = tmp_path / "story.txt", tmp_path / "ladder"
    corpus.write_text("the loom weaves a thread, and the thread a cloth; " * 60)
    assert climb(corpus, out, "mlp", "moe") == 0
    shown = capsys.readouterr().out
    assert "| mlp |" in shown and "| moe |" in shown and (out / "ladder.png").stat().st_size > 1000
    first = (out / "01-mlp" / "run.json").stat().st_mtime_ns
    assert climb(corpus, out, "mlp", "attention") == 0
    assert (out / "01-mlp" / "run.json").stat().st_mtime_ns == first
    assert [rung["name"] for rung in json.loads((out / "ladder.json").read_text())] == ["mlp", "attention"]


@pytest.mark.parametrize(
    ("flags", "says"), [(["--rungs", "mlp", "lstm"], "'lstm' is none of mlp"), (["--d-model", "0"], "d_model")]
)
def test_a_mistake_is_named(flags, says, tmp_path, capsys):
    assert main(["ladder", "stdlib", "--out", str(tmp_path / "x"), *flags]) == 2
    assert says in capsys.readouterr().err
