import io

import pytest
import torch

from warploom.engine.training import train
from warploom.engine.training.callbacks import ConsoleLogger, JsonLog, LivePanel, Progress, Spikes, duration, sparkline
from warploom.engine.training.evaluate import Evaluation


def progress(step, **changes):
    settings = {
        "step": step, "steps": 100, "loss": 5.0 / step, "lr": 1e-3, "grad_norm": 0.5, "tokens": 64 * step,
        "tokens_per_second": 1234.0, "seconds": 3.0 * step, "seconds_left": 125.0, "utilization": 0.25,
    }  # fmt: skip
    return Progress(**{**settings, **changes})


def test_console_logger_line_now_and_then():
    """A log gets a line now and then and one at the end."""
    stream = io.StringIO()
    lines = ConsoleLogger(every_seconds=10, stream=stream)
    for step in range(1, 101):
        lines.on_step(progress(step))
    written = stream.getvalue().splitlines()
    assert len(written) == pytest.approx(300 / 12, abs=2)
    assert (
        written[0].startswith("step 1/100  loss 5.0000") and "1,234 tok/s" in written[0] and "2m05s left" in written[0]
    )
    assert written[-1].startswith("step 100/100")


def test_the_panel_shows_loss_speed_and_time_left():
    from rich.console import Console

    panel = LivePanel()
    panel.console = panel.live.console = Console(file=io.StringIO(), width=100, force_terminal=True)
    panel.on_evaluation(1, Evaluation(2.5, 1.25, 100))
    for step in range(1, 30):
        panel.on_step(progress(step, expert_load=(0.5, 1.5)))
    panel.on_message("a sentence")
    panel.on_end()
    shown = panel.console.file.getvalue()
    for text in (
        "step 29 of 100",
        "0.1724",
        "2.5000",
        "1.2500 bits per byte",
        "1,234 tok/s",
        "0.50–1.50",
        "a sentence",
    ):
        assert text in shown
    assert not panel.live.is_started


def test_log_cut_short_continues_from_checkpoint(tmp_path):
    """A log that a crash cut short is continued from the checkpoint."""
    path = tmp_path / "log.jsonl"
    log = JsonLog(path, 1, 0)
    for step in range(1, 8):
        log.on_step(progress(step))
    log.on_end()
    path.write_text(path.read_text()[:-20])
    log = JsonLog(path, 1, 4)
    log.on_step(progress(5))
    log.on_end()
    assert [line["step"] for line in JsonLog.read(path)] == [1, 2, 3, 4, 5]


def test_kill_while_log_is_cut_leaves_it_whole(tmp_path, monkeypatch):
    """A kill while a log is taken up again leaves it whole."""
    path = tmp_path / "log.jsonl"
    log = JsonLog(path, 1, 0)
    log.on_step(progress(1))
    log.on_end()
    written = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: _raise(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        JsonLog(path, 1, 1)
    assert path.read_text() == written


def test_a_jump_of_the_loss_is_noticed_and_noise_is_not():
    spikes = Spikes(window=50)
    assert not any(spikes.judge(2.0 + 0.1 * (step % 3)) for step in range(200))
    assert "jumped to 4.000" in spikes.judge(4.0)


def test_the_load_of_experts_is_told(tiny, recorder):
    train(tiny(model={**tiny().model, "n_experts": 4, "d_ff": 16}, steps=3, eval_every=0), [recorder])
    least, most = recorder.steps[-1].expert_load
    assert 0 <= least < 1 < most <= 4


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 60), lambda: _raise(torch.OutOfMemoryError("1 TiB"))])
def test_running_out_of_memory_names_the_flags_to_change(tiny, monkeypatch, ask):
    monkeypatch.setattr("warploom.engine.training.trainer.losses", lambda *_, **__: ask())
    with pytest.raises(
        ValueError, match=r"out of memory on cpu.*raise grad_accum_steps=1, or set activation_checkpointing"
    ):
        train(tiny())


def _raise(error):
    raise error


@pytest.mark.parametrize("changes", [{"tensorboard": True}, {"wandb": "project"}])
def test_missing_package_named_before_start(tiny, monkeypatch, changes):
    """A missing package is named before anything long begins."""
    monkeypatch.setattr("warploom.engine.training.callbacks.find_spec", lambda name: None)
    (package,) = changes
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}"):
        train(tiny(data="nothing-was-read-yet", **changes))


def test_durations_and_sparklines_are_read_at_a_glance():
    assert [duration(s) for s in (5.4, 125, 7300)] == ["5s", "2m05s", "2h01m"]
    assert sparkline([8, 8, 4, 4, 1, 1], 3) == "█▄▁" and sparkline([], 5) == "" and sparkline([3.0], 5) == "▁"
