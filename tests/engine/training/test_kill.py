"""Kill the process at random moments, resume, and end with the bits of a run that nobody touched.

`WARPLOOM_KILLS=100 pytest tests/engine/training/test_kill.py` is the long version.
"""

import dataclasses
import hashlib
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from warploom.engine.training import train
from warploom.engine.training.checkpoint import Checkpoints

KILLS = int(os.environ.get("WARPLOOM_KILLS", "5"))
STEPS = 8 * KILLS


@pytest.fixture
def processes(monkeypatch):
    """Processes that have imported everything already, and compute in one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warploom.engine.training.trainer", "warploom.tokenizer", "warploom.engine.hub"])
    return context


def hashes(out):
    names = (
        "model.safetensors",
        f"checkpoints/step-{STEPS}/model.safetensors",
        f"checkpoints/step-{STEPS}/optimizer.pt",
    )
    return [hashlib.sha256((Path(out) / name).read_bytes()).hexdigest() for name in names]


@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tiny, processes):
    model = {**tiny().model, "dropout": 0.1}
    whole = tiny("whole", model=model, steps=STEPS, save_every=3, eval_every=9, dtype="bfloat16")
    killed = dataclasses.replace(whole, out=whole.out.replace("whole", "killed"), resume=True)
    untouched = processes.Process(target=train, args=(whole,))
    untouched.start()
    draw, kills = random.Random(0), 0
    checkpoints = Checkpoints(Path(killed.out) / "checkpoints")
    while kills < KILLS:
        process = processes.Process(target=train, args=(dataclasses.replace(killed, num_workers=kills % 4),))
        process.start()
        before = checkpoints.steps()[:1]
        while process.is_alive() and checkpoints.steps()[:1] == before:
            time.sleep(0.002)  # until it has made progress worth losing
        time.sleep(draw.random() * 0.1)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    last = processes.Process(target=train, args=(killed,))
    last.start()
    for process in (last, untouched):
        process.join(60 + 10 * KILLS)
        assert process.exitcode == 0
    assert kills >= 0.6 * KILLS
    assert hashes(killed.out) == hashes(whole.out)
