import gc
import itertools
import json
import math
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from warploom.engine.formats.model_directory import load_model
from warploom.engine.training import Callback, TrainConfig, train
from warploom.engine.training.checkpoint import verify


def weights(directory):
    return load_file(directory / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def last_weights(result):
    return weights(result.directory / "checkpoints" / f"step-{result.steps}")


class StopAt(Callback):
    """Sends this process a signal after a step, as a user or a scheduler would."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step(self, progress):
        if progress.step == self.step:
            signal.raise_signal(self.number)


def test_run_learns_and_leaves_model_and_log(tiny, recorder):
    """A run learns and leaves a model directory a log a curve and a card."""
    result = train(tiny(steps=60, lr=1e-2, eval_every=30), [recorder])
    assert recorder.losses[0] > 3 and min(recorder.losses[-5:]) < 2.3
    assert result.val_loss == min(found.loss for _, found in recorder.evaluations) < 2.4
    assert [step for step, _ in recorder.evaluations] == [30, 60]
    assert recorder.samples and recorder.done == 1
    model, tokenizer = load_model(result.directory)
    assert tokenizer.decode(tokenizer.encode("1 and 2 make 3.")) == "1 and 2 make 3."
    assert model.config.vocab_size == tokenizer.vocab_size
    log = [json.loads(line) for line in (result.directory / "log.jsonl").read_text().splitlines()]
    assert log == result.history and sum("lr" in line for line in log) == 60
    assert (result.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((result.directory / "run.json").read_text())
    assert run["result"]["val_loss"] == result.val_loss and run["config"]["lr"] == 1e-2
    card = (result.directory / "RUN.md").read_text()
    assert f"validation loss | {result.val_loss:.4f}" in card and "adamw, lr 0.01, schedule cosine" in card
    assert run["data"]["train_sha256"][:16] in card and recorder.samples[-1][2] in card and "loss.png" in card
    assert result.evaluation.perplexity == pytest.approx(math.exp(result.val_loss))
    assert result.evaluation.bits_per_byte == pytest.approx(result.val_loss / math.log(2))  # a character is a byte here


@pytest.mark.parametrize(
    ("dropout", "changes"),
    [
        (0.1, {}),
        (0.1, {"optimizer": "muon", "ema": 0.9}),
        (0.1, {"order": "packed", "dtype": "bfloat16"}),
        (0.0, {"order": "packed", "dtype": "bfloat16"}),  # by fused blocks, where a CPU has them
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(tiny, dropout, changes):
    model = {**tiny().model, "dropout": dropout}
    whole = train(tiny("whole", model=model, **changes))
    stopped = train(tiny("parts", model=model, **changes), [StopAt(7)])
    assert stopped.stopped_by == "SIGTERM" and stopped.steps == 7
    resumed = train(tiny("parts", model=model, resume=True, **changes))
    assert resumed.steps == 12
    assert same(last_weights(whole), last_weights(resumed))
    assert resumed.val_loss == whole.val_loss and same(weights(whole.directory), weights(resumed.directory))
    assert [line.get("loss") for line in resumed.history] == [line.get("loss") for line in whole.history]


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, recorder):
    result = train(tiny(), [StopAt(3, signal.SIGINT), recorder])
    assert result.stopped_by == "SIGINT"
    assert verify(result.directory / "checkpoints" / "step-3")["step"] == 3
    assert any("step 3 of 12" in note and "resume" in note for note in recorder.notes)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_between_steps_loses_no_step(tiny, monkeypatch):
    """Garbage is collected there once, when it has been decided whether the first step is saved."""

    def collect():
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gc, "collect", collect)
    result = train(tiny())
    assert result.stopped_by == "SIGTERM"
    assert verify(result.directory / "checkpoints" / f"step-{result.steps}")["step"] == result.steps


def test_run_independent_of_how_it_is_cut(tiny, recorders):
    """What a run computes does not depend on how it is cut up."""
    ends = []

    def losses(**changes):
        recorder = recorders()
        ends.append(train(tiny("-".join(f"{name}{value}" for name, value in changes.items()), **changes), [recorder]))
        return recorder.losses

    whole = losses(num_workers=1)
    assert losses(num_workers=0) == whole == losses(num_workers=3)
    assert same(last_weights(ends[0]), last_weights(ends[1])) and same(last_weights(ends[0]), last_weights(ends[2]))
    assert losses(grad_accum_steps=4) == pytest.approx(whole, abs=2e-5)
    assert losses(activation_checkpointing=True) == pytest.approx(whole, rel=2e-6)
    assert losses(seed=1) != whole


def test_uneven_targets_weigh_alike_in_every_micro_batch(tiny, recorders):
    """Packed rows hold different numbers of targets; the loss is their mean over the step, however it is cut."""
    curves = []
    for parts in (1, 4):
        recorder = recorders()
        train(tiny(f"packed{parts}", order="packed", grad_accum_steps=parts), [recorder])
        curves.append(recorder.losses)
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)


def test_bfloat16_follows_the_float32_curve(tiny, recorders):
    curves = []
    for dtype in ("float32", "bfloat16"):
        recorder = recorders()
        result = train(tiny(dtype, dtype=dtype, steps=40, lr=1e-2), [recorder])
        curves.append(recorder.losses)
        assert {weight.dtype for weight in last_weights(result).values()} == {torch.float32}
    assert curves[1] == pytest.approx(curves[0], rel=0.03)
    assert curves[0] != curves[1]


class Poison(Callback):
    """Breaks the model after a step."""

    def __init__(self, at):
        self.at, self.trainer = at, None

    def on_step(self, progress):
        if progress.step in self.at:
            self.trainer.state.masters.named["norm.weight"].data.fill_(float("nan"))
            self.trainer.state.masters.copy_to_model()
        elif progress.step - 1 in self.at:
            self.trainer.state.masters.named["norm.weight"].data.fill_(1.0)
            self.trainer.state.masters.copy_to_model()


def poisoned(config, at):
    from warploom.engine.training.trainer import Trainer

    poison = Poison(at)
    poison.trainer = Trainer(config, [poison])
    return poison.trainer


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny):
    trainer = poisoned(tiny(eval_every=0), at={4})
    before = None

    class Keep(Callback):
        def on_step(self, progress):
            nonlocal before
            current = trainer.state.masters.named["blocks.0.ffn.down.weight"].detach().clone()
            if progress.step == 5:
                assert torch.equal(before, current) and progress.bad_steps == 1 and math.isnan(progress.loss)
            before = current

    trainer.callbacks.append(Keep())
    result = trainer.run()
    assert result.steps == 12 and trainer.state.bad_steps == 1
    assert all(weight.isfinite().all() for weight in last_weights(result).values())


def test_a_run_that_stays_broken_ends_with_a_report(tiny):
    trainer = poisoned(tiny(steps=50, max_nonfinite_steps=3), at=set(range(4, 60)))
    with pytest.raises(ValueError, match=r"3 steps in a row.*lower lr"):
        trainer.run()
    assert trainer.state.step < 10


class Clock:
    """Time that moves on by ten milliseconds at each look."""

    perf_counter = itertools.count(step=0.01).__next__


def test_budgets_agree_on_the_number_of_steps(tiny, monkeypatch):
    tokens_a_step = 4 * 32
    assert train(tiny("tokens", steps=None, tokens=5 * tokens_a_step - 1)).steps == 5
    by_epoch = train(tiny("epochs", steps=None, epochs=0.05, order="epochs"))
    train_tokens = json.loads((by_epoch.directory / "run.json").read_text())["data"]["train_tokens"]
    assert by_epoch.steps == math.ceil(0.05 * (((train_tokens - 1) // 32) // 4))
    monkeypatch.setattr("warploom.engine.training.trainer.time", Clock)
    timed = train(tiny("minutes", steps=None, minutes=0.01, eval_every=0, save_every=0))
    assert timed.steps == pytest.approx(20, abs=2), "three looks at the clock a step"
    assert timed.history[-2]["lr"] < 3e-4, "its end, a tenth of 2e-3, is reached"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}}, "was trained with n_heads=2"),
        ({"optimizer": "muon"}, "was trained with optimizer='adamw'"),
    ],
)
def test_resuming_another_run_is_refused(tiny, changes, sentence):
    train(tiny(steps=2, eval_every=0))
    with pytest.raises(ValueError, match=sentence):
        train(tiny(steps=4, resume=True, **changes))


def test_a_run_is_not_overwritten_by_accident(tiny, recorder):
    train(tiny(steps=2, eval_every=0))
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(steps=2))
    assert train(tiny(steps=3, overwrite=True)).steps == 3
    train(tiny("empty", steps=1, resume=True), [recorder])
    assert any("no checkpoint to resume" in note for note in recorder.notes)


def test_two_runs_do_not_write_to_one_folder(tiny):
    config = tiny(steps=2, eval_every=0)
    train(config)
    code = "import sys; from warploom.engine.training.checkpoint import *; file = lock_run(Path(sys.argv[1])); "
    command = [sys.executable, "-c", code + "print(file); input()", config.out]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for again in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="is in use by another run"):
                train(tiny(steps=4, **again))
        other.kill()
    assert train(tiny(steps=4, resume=True)).steps == 4


def test_corpus_of_three_characters_refused(tiny, tmp_path):
    """A corpus of three characters is refused in one sentence."""
    (tmp_path / "abc.txt").write_text("abc")
    with pytest.raises(ValueError, match="tokens, too few for one window of context_length 32"):
        train(tiny(data=str(tmp_path / "abc.txt")))


def test_fine_tuning_starts_from_directory(tiny, recorder):
    """Fine tuning starts from the weights of a directory."""
    base = train(tiny("base", steps=40, lr=1e-2))
    data = str(base.directory / "data")
    train(tiny("tuned", data=data, init_from=str(base.directory), steps=2, lr=1e-5), [recorder])
    assert recorder.losses[0] < base.val_loss + 0.3


def test_large_micro_batch_on_cpu_is_told(tiny, recorder, monkeypatch):
    """Before the first step, which may take minutes or all memory, the flags that shrink it are named."""
    monkeypatch.setattr("warploom.engine.training.trainer.LARGE", 127)
    train(tiny(steps=1), [recorder])
    assert any("4 rows of context=32 tokens: if that is slow or too large" in note for note in recorder.notes)
    recorder.notes.clear()
    train(tiny("other", steps=1, batch_size=2), [recorder])
    assert not any("rows of context" in note for note in recorder.notes)


def test_training_works_outside_the_main_thread(tiny):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(steps=2, eval_every=0))))
    thread.start()
    thread.join()
    assert results[0].steps == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 5, "epochs": 1}, "give one of steps, epochs"),
        ({"steps": 0}, "steps must be more than 0"),
        ({"warmup": -5}, "warmup must be at least 0"),
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"min_lr": 5.0}, "min_lr=5.0 must be at most lr"),
        ({"batch_size": 6, "grad_accum_steps": 4}, "must be a multiple of grad_accum_steps=4"),
        ({"schedule": "cosin"}, "schedule must be one of"),
        ({"ema": 1.0}, "ema must be in"),
    ],
)
def test_a_bad_setting_is_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig("x", **changes)
