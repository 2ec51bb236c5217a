import json

import pytest

from tests.engine.training import footprint
from warploom.engine.memory import RESET, left_in_container
from warploom.engine.training import train
from warploom.engine.training.batch_size_finder import LinearMemoryModel, predict
from warploom.engine.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not RESET.exists(), reason="only Linux tells the peak memory of a process")

LLAMA = {"d_model": 192, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 2048, "max_seq_len": 256}
GPT2 = {**LLAMA, "n_kv_heads": 4, "norm": "layernorm", "position": "learned", "ffn": "gelu", "bias": True}
RUNS = {
    "llama": {"model": LLAMA},
    "gpt2 in bfloat16": {"model": GPT2, "dtype": "bfloat16"},
    "moe": {"model": {**LLAMA, "n_experts": 4, "d_ff": 192}},
    "moe in bfloat16": {"model": {**LLAMA, "n_experts": 8, "d_ff": 192}, "dtype": "bfloat16"},
    "a large vocabulary, in two parts, sgd": {
        "model": {**LLAMA, "n_layers": 2, "vocab_size": 8192}, "grad_accum_steps": 2,
        "optimizer": "sgd", "batch_size": 16,
    }, "recomputation": {"model": {**LLAMA, "n_layers": 6, "max_seq_len": 512}, "activation_checkpointing": True,
    "batch_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_predicted_memory_within_a_tenth(tiny, processes, tmp_path, name):
    """Predicted memory is within a tenth of what the system gives a run."""
    changes = {"batch_size": 8, "preset": "llama-tiny", "save_every": 0, **RUNS[name]}
    assert processes(footprint.main, config=tiny(**changes)) == [0, 0]
    predicted, taken = (int((tmp_path / f"run-{rank}.bytes").read_text()) for rank in (0, 1))
    assert taken > 20 << 20
    assert predicted == pytest.approx(taken, rel=0.1)


def test_predicting_leaves_the_run_as_new(tiny, recorders):
    curves = [recorders(), recorders()]
    for name, recorder in zip(("plain", "predicted"), curves):
        trainer = Trainer(tiny(name, eval_every=0, model={**tiny().model, "dropout": 0.1}), [recorder])
        if name == "predicted":
            assert predict(trainer.state, trainer.loader).peak(4) > 0
        trainer.run()
    assert curves[0].losses == curves[1].losses


def test_a_step_is_cut_into_as_few_micro_batches_as_fit(tiny, recorders, monkeypatch):
    lines = {
        1: LinearMemoryModel(1000, 100),
        2: LinearMemoryModel(1200, 100),
    }  # in parts, gradients wait for those of the next
    monkeypatch.setattr("warploom.engine.training.batch_size_finder.predict", lambda run, loader, parts=1: lines[parts])
    for available, cuts in ((1800, 1), (1799, 2), (1600, 2), (1599, 4), (1, 8)):
        monkeypatch.setattr(
            "warploom.engine.training.batch_size_finder.available_memory", lambda _, free=available: free / 0.9 + 1
        )
        recorder, plain = recorders(), recorders()
        settings = {"batch_size": 8, "eval_every": 0, "steps": 2, "overwrite": True}
        result = train(tiny("auto", grad_accum_steps=0, **settings), [recorder])
        assert json.loads((result.directory / "run.json").read_text())["micro_batches"] == cuts
        assert any(f"grad_accum_steps={cuts}" in note for note in recorder.notes)
        train(tiny("plain", grad_accum_steps=cuts, **settings), [plain])
        assert recorder.losses == plain.losses


def test_memory_of_a_container_is_its_limit(tmp_path):
    """A container leaves what its limit and its cache say."""
    for name, text in {"max": "1000\n", "current": "700\n", "stat": "anon 1\ninactive_file 200\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert left_in_container(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_container(tmp_path) == left_in_container(tmp_path / "none") == float("inf")
