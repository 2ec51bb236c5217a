"""Two processes compute what one computes, and a run may change its number of processes at any checkpoint."""

import dataclasses
import hashlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from warploom.engine.training import train
from warploom.engine.training.checkpoint import Checkpoints, load_tensors
from warploom.engine.training.watch import JsonLog

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def pair(monkeypatch):
    """Runs a script in two processes; returns how they ended."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warploom.engine.training.trainer", "warploom.tokenizer", "warploom.engine.hub"])

    def run(script, **globals_):
        path = str(Path(__file__).with_name(script))
        team = [context.Process(target=runpy.run_path, args=(path, {"RANK": rank, **globals_})) for rank in range(2)]
        for process in team:
            process.start()
        for process in team:
            process.join(120)
        return [process.exitcode for process in team]

    return run


@pytest.fixture
def together(pair):
    """Runs a config in two processes."""

    def run(config):
        assert pair("member.py", SIZE=2, PORT=free_port(), CONFIG=config) == [0, 0]
        return losses(config)

    return run


def losses(config):
    return [line["loss"] for line in JsonLog.read(Path(config.out) / "log.jsonl") if "loss" in line]


def state(config, step):
    directory = Path(config.out) / "checkpoints" / f"step-{step}"
    return load_file(directory / "model.safetensors"), load_tensors(directory, "optimizer")["state"]


def test_replicas_and_shards_train_as_one_process_does(tiny, together):
    model = {**tiny().model, "n_kv_heads": 2}
    one = tiny(
        "one", model=model, steps=20, save_every=10, order="packed", grad_accum_steps=2
    )  # rows with unequal targets
    train(one)
    for name, grid in (("copies", {"dp": 2}), ("slices", {"fsdp": 2}), ("pieces", {"tp": 2})):
        config = dataclasses.replace(one, out=one.out.replace("one", name), **grid)
        assert together(config) == pytest.approx(losses(one), abs=1e-6), name


def test_a_run_changes_its_number_of_processes_at_a_checkpoint(tiny, together):
    one = tiny("one", steps=16, save_every=8, keep_last=9)
    train(one)
    shards = dataclasses.replace(one, out=one.out.replace("one", "moved"), steps=8, schedule="constant", fsdp=2)
    steady = dataclasses.replace(one, out=one.out.replace("one", "steady"), schedule="constant")
    train(steady)
    together(shards)
    saved = state(shards, 8)
    train(dataclasses.replace(shards, resume=True, fsdp=1, steps=8, keep_last=9))
    again = state(shards, 8)
    assert all(torch.equal(saved[0][name], again[0][name]) for name in saved[0])
    train(dataclasses.replace(shards, resume=True, fsdp=1, steps=12))
    assert together(dataclasses.replace(shards, resume=True, steps=16)) == pytest.approx(losses(steady), abs=1e-6)
    moments, expected = state(shards, 16)[1], state(steady, 16)[1]
    for index, entry in expected.items():
        torch.testing.assert_close(moments[index]["exp_avg"], entry["exp_avg"], rtol=1e-3, atol=1e-6)


def test_processes_do_not_wait_for_the_dead_whose_addresses_torchrun_keeps(pair):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert pair("generation.py", PORT=store.port, DOOMED=1) == [1, -signal.SIGKILL]
    assert pair("generation.py", PORT=store.port, DOOMED=None) == [0, 0]


def test_torchrun_restarts_a_run_whose_process_was_killed_and_ends_with_the_same_bits(tiny, together):
    whole = tiny("whole", steps=60, save_every=4, eval_every=0)
    together(whole)
    out = Path(whole.out).with_name("restarted")
    model = [f"--{name.replace('_', '-')}={value}" for name, value in whole.model.items()]
    flags = ["--tokenizer=char", "--steps=60", "--batch-size=4", "--save-every=4", "--eval-every=0", "--dtype=float32"]
    flags += ["--sample-tokens=4", "--device=cpu", "--log-every=1", "--eval-batches=2", *model]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    launch += ["--max-restarts=2", "-m", "warploom.engine.cli", "train", whole.data, f"--out={out}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    agent = subprocess.Popen(launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints = Checkpoints(out / "checkpoints")
    while agent.poll() is None and not checkpoints.steps():
        time.sleep(0.01)
    victim = _member_of(agent.pid, rank=1)
    os.kill(victim, signal.SIGKILL)
    output, _ = agent.communicate(timeout=200)
    assert agent.returncode == 0, output
    assert "resuming from" in output
    digests = [
        hashlib.sha256((folder / "checkpoints/step-60/model.safetensors").read_bytes()).hexdigest()
        for folder in (Path(whole.out), out)
    ]
    assert digests[0] == digests[1]


def _member_of(agent, rank):
    """The process of a torchrun that has this rank."""
    for task in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((task / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent and f"\0RANK={rank}\0".encode() in b"\0" + (task / "environ").read_bytes() + b"\0":
                return int(task.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"torchrun has no process of rank {rank}")
