import errno
import io
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from warploom.engine.training import AdamW, Callback, load_checkpoint, save_checkpoint, train
from warploom.engine.training.checkpoint import Checkpoints, restore_rng_state, rng_state
from warploom.tokenizer.sources import unfinished


def trained():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_checkpoint_file_restores_state(tmp_path):
    """A checkpoint file restores weights optimizer and step."""
    model, optimizer = trained()
    file = io.BytesIO()
    for target in (tmp_path / "state.pt", str(tmp_path / "again.pt"), file):
        save_checkpoint(model, optimizer, 17, target)
    file.seek(0)
    for source in (tmp_path / "state.pt", str(tmp_path / "again.pt"), file):
        other = torch.nn.Linear(3, 2)
        moments = AdamW(other.parameters())
        assert load_checkpoint(source, other, moments) == 17
        assert torch.equal(other.weight, model.weight)
        assert torch.equal(moments.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
        assert moments.param_groups[0]["lr"] == 0.1


def test_checkpoint_file_torn_is_refused(tmp_path):
    """A torn checkpoint file is refused in one sentence."""
    path = tmp_path / "state.pt"
    save_checkpoint(*trained(), 1, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no checkpoint") as error:
        load_checkpoint(path, torch.nn.Linear(3, 2))
    assert "\n" not in str(error.value)


def test_every_generator_continues_where_it_was():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn()

    np.random.randn()  # leaves a second normal number waiting
    state = rng_state()
    first = draw()
    draw()
    restore_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_checkpoint_damaged_is_passed_over(tiny, recorder, damage):
    """A damaged checkpoint is passed over with a message."""
    result = train(tiny())
    last = result.directory / "checkpoints" / "step-12"
    victim = last / {"state": "state.json", "remove": "optimizer.pt"}.get(damage, "model.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    resumed = train(tiny(resume=True, steps=13), [recorder])
    assert resumed.steps == 13
    assert any("skipped a damaged checkpoint" in note and victim.name in note for note in recorder.notes)
    assert any("step-10" in note and "resuming" in note for note in recorder.notes)


def test_only_the_last_checkpoints_are_kept(tiny):
    result = train(tiny(save_every=2, keep_last=3))
    assert Checkpoints(result.directory / "checkpoints").steps() == [12, 10, 8]


def test_a_full_disk_leaves_the_checkpoint_before_intact(tiny, monkeypatch):
    save = torch.save
    count, works = 0, 0

    def fail_at_last(*arguments, **named):
        nonlocal count
        count += 1
        if count > works:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **named)

    monkeypatch.setattr("warploom.engine.training.checkpoint.torch.save", fail_at_last)
    config = tiny(eval_every=0)
    with pytest.raises(ValueError, match=r"No space left on device; free some space: there is none before it"):
        train(config)
    count, works = 0, 2
    with pytest.raises(ValueError, match=r"No space left on device; the one before it is intact"):
        train(config)
    monkeypatch.undo()
    folder = Checkpoints(Path(config.out) / "checkpoints")
    assert folder.steps() == [5] and folder.latest() is not None
    assert not list(folder.folder.glob(".*"))


def test_leftovers_of_killed_processes_no_obstacle(tiny):
    """Numbers of processes come again: in a container each may be the first."""
    config = tiny()
    out = Path(config.out)
    scratch = out / "checkpoints" / ".step-5.partial"
    neighbor = unfinished(out.with_name("run.2"))
    for folder in (unfinished(out), unfinished(out / "data"), scratch, unfinished(scratch), neighbor):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half of")
    train(config)
    assert not [*out.glob(".*"), *scratch.parent.glob(".*")]
    assert list(out.parent.glob(".*")) == [neighbor]


def test_save_leader_leaves_others_files(tmp_path):
    """The leader of a save leaves what others have begun to write."""
    early = tmp_path / ".step-4.partial" / "shards" / "shard-2"
    early.parent.mkdir(parents=True)
    early.write_text("by a process that was first")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, {}, {}, write_shards=lambda scratch: {})
    checkpoints.wait()
    assert (tmp_path / "step-4" / "shards" / "shard-2").exists()


def test_save_writes_state_at_the_save(tiny, monkeypatch):
    """A slow disk: the writer of step 5 gets to work only when step 8 is done."""
    reached, write = threading.Event(), Checkpoints._write

    def late(self, step, *details):
        assert step != 5 or reached.wait(200)
        write(self, step, *details)

    class Release(Callback):
        def on_step(self, progress):
            if progress.step == 8:
                reached.set()

    monkeypatch.setattr(Checkpoints, "_write", late)
    slow = train(tiny("slow", keep_last=9), [Release()])
    monkeypatch.undo()
    fast = train(tiny("fast", keep_last=9))
    for file in ("model.safetensors", "optimizer.pt"):
        first, second = ((run.directory / "checkpoints" / "step-5" / file).read_bytes() for run in (slow, fast))
        assert first == second
