import json

import pytest
import torch

from warploom.engine.training import train
from warploom.engine.training.evaluate import losses
from warploom.engine.training.memory import LiveTensors, peak_of, predict
from warploom.engine.training.trainer import Trainer


def test_live_tensors_counts_storages_once_and_until_they_die():
    watch = LiveTensors()
    with watch:
        first = torch.zeros(1000)
        view = first[10:]  # the same storage
        second = first + 1
        del first, view
        third = torch.zeros(500)
    assert watch.peak == 8000 and watch.live == 6000
    del second, third
    assert watch.live == 0


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "sgd")])
def test_predicted_memory_is_within_a_tenth_of_what_a_whole_step_takes(tiny, dtype, optimizer):
    trainer = Trainer(tiny(batch_size=24, dtype=dtype, optimizer=optimizer), [])
    line, batch = predict(trainer), trainer.loader.batch(0)
    trainer.one_step(batch)  # makes the moments
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    standing = [*trainer.model.parameters(), *trainer.masters.named.values()]
    standing += [value for value in moments if isinstance(value, torch.Tensor)]

    def step(rows):
        losses(trainer.model, batch.rows(0, rows)).total.backward()
        trainer.masters.zero_grad()

    for rows in (6, 24):
        taken = peak_of(lambda rows=rows: step(rows), trainer.device, standing)
        assert line.peak(rows) == pytest.approx(taken, rel=0.1)
        assert line.rows(line.peak(rows)) == rows


def test_a_step_is_cut_into_as_few_micro_batches_as_fit(tiny, recorders, monkeypatch):
    config = tiny("auto", batch_size=8, grad_accum_steps=0, eval_every=0)
    line = predict(Trainer(tiny("probe", batch_size=8), []))
    monkeypatch.setattr("warploom.engine.training.memory.available_memory", lambda device: line.peak(3) / 0.9)
    recorder, plain = recorders(), recorders()
    result = train(config, [recorder])
    assert json.loads((result.directory / "run.json").read_text())["micro_batches"] == 4  # 3 rows fit, 2 divide 8
    assert any("grad_accum_steps=4" in note for note in recorder.notes)
    train(tiny("plain", batch_size=8, grad_accum_steps=4, eval_every=0), [plain])
    assert recorder.losses == plain.losses
