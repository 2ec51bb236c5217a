"""Two processes compute what one computes, and a run may change its number of processes at any checkpoint."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.training import courier, generation, member, mistake, newborn
from warploom.engine.formats.model_writer import save_model
from warploom.engine.memory import RESET
from warploom.engine.model import Transformer
from warploom.engine.training import train
from warploom.engine.training.callbacks import JsonLog
from warploom.engine.training.distributed import failures
from warploom.engine.training.inputs import prepare
from warploom.engine.training.trainer import Trainer

PAIRED = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32}  # heads for two

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def store():
    """What torchrun has: a store of its own for each run, by which processes find each other."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def together(processes):
    """Runs a config in as many processes as its grid has places, copies included."""

    def run(config):
        size = (config.dp or 1) * config.fsdp * config.tp * config.ep
        kept = store()
        assert processes(member.main, size, size=size, port=kept.port, config=config) == [0] * size
        return losses(config)

    return run


def losses(config):
    return [line["loss"] for line in JsonLog.read(Path(config.out) / "log.jsonl") if "loss" in line]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ddp_fsdp_tp_train_as_one_process(tiny, together):
    """Copies slices and pieces train as one process does."""
    unequal = {"order": "packed", "grad_accum_steps": 2}  # rows with more and with fewer targets
    one = tiny("one", model=PAIRED, steps=20, save_every=10, **unequal)
    train(one)
    for name, grid in (("copies", {"dp": 2}), ("slices", {"fsdp": 2}), ("pieces", {"tp": 2})):
        config = dataclasses.replace(one, out=one.out.replace("one", name), **grid)
        assert together(config) == pytest.approx(losses(one), rel=2e-6), name


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells the peak memory of a process")
def test_fsdp_init_holds_only_its_shard(tiny, processes):
    """No process ever holds more than its part and yet all start as one process does."""
    shape = {"d_model": 512, "n_layers": 8, "n_experts": 4, "d_ff": 512}
    one = tiny("one", model={**PAIRED, **shape})
    torch.manual_seed(one.seed)
    whole = Transformer(prepare(one, print).model)
    numbers = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in whole.parameters())).hexdigest()
    size = sum(p.nbytes for p in whole.parameters())
    for grid in ({"fsdp": 2}, {"tp": 2}):
        out, kept = one.out.replace("one", str(*grid)), store()
        config = dataclasses.replace(one, out=out, **grid)
        assert processes(newborn.main, size=2, port=kept.port, config=config) == [0, 0]
        assert Path(f"{out}.digest").read_text() == numbers, grid
        taken = [int(Path(f"{out}-{rank}.bytes").read_text()) for rank in (0, 1)]
        assert size / 2 < max(taken) < 0.75 * size, grid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ddp_sends_during_last_micro_batch(tiny, processes, dtype):
    """Gradients leave in the last micro batch while those before them are still made."""
    config, kept = tiny(model=PAIRED, dp=2, grad_accum_steps=2, dtype=dtype), store()
    assert processes(courier.main, port=kept.port, config=config) == [0, 0]
    for rank in (0, 1):
        missing, buckets = json.loads(Path(f"{config.out}-{rank}.json").read_text())
        assert len(missing) == buckets > 2, "each leaves once, none of them in the first micro-batch"
        assert missing[0] > missing[1] > 0 and missing[-1] == 0


@pytest.mark.parametrize("grid", [{"ep": 2}, {"tp": 2}, {"dp": 2, "ep": 2}, {"fsdp": 2}], ids="-".join)
def test_experts_train_as_one_process(tiny, together, grid):
    """Experts are trained and balanced as one process does."""
    experts = {"n_experts": 4, "d_ff": 64, "balance_loss": 0.3, "router_z_loss": 0.1}  # so that they matter
    one = tiny("one", model={**PAIRED, **experts}, steps=20, save_every=50, eval_every=0)
    train(one)
    config = dataclasses.replace(one, out=one.out.replace("one", "two"), **grid)
    assert together(config) == pytest.approx(losses(one), rel=2e-6)


def test_muon_orthogonalizes_whole_matrices(tiny, together):
    """Muon orthogonalizes whole matrices whoever keeps their parts."""
    one = tiny("one", model={**PAIRED, "n_experts": 2, "d_ff": 64}, optimizer="muon", steps=20, save_every=10)
    train(one)
    for grid in ({"fsdp": 2}, {"tp": 2}, {"ep": 2}):
        config = dataclasses.replace(one, out=one.out.replace("one", str(*grid)), **grid)
        assert together(config) == pytest.approx(losses(one), rel=2e-6), grid


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dp": 2, "tp": 2}, "dp=2 × fsdp=1 × ep=1 × tp=2 needs 4 processes, but this run has 1"),
        ({"fsdp": 2}, "fsdp=2 .* needs 2 processes, but this run has 1"),
    ],
)
def test_mesh_not_fitting_processes_refused(tiny, changes, sentence):
    """A grid that does not fit the processes is refused in one sentence."""
    with pytest.raises(ValueError, match=sentence):
        train(tiny(**changes))


def test_mistake_of_all_processes_said_once(processes, tmp_path):
    """A mistake of all processes is said by one of them and by torchrun."""
    kept = store()
    assert processes(mistake.main, port=kept.port, out=tmp_path / "run") == [2, 2]
    sentence = "dp=1 × fsdp=1 × ep=1 × tp=3 needs 3 processes, but this run has 2"
    said = sorted((tmp_path / f"run{rank}.said").read_text() for rank in (0, 1))
    assert said == ["", f"warploom train: {sentence}\n"]
    (told,) = tmp_path.glob("run*.json")
    assert json.loads(told.read_text())["message"]["message"] == sentence


@pytest.mark.parametrize("grid", [{"fsdp": 2}, {"tp": 2}, {"dp": 2, "fsdp": 2}], ids="-".join)
def test_a_run_changes_its_processes_at_a_checkpoint(tiny, together, tmp_path, grid):
    steady = tiny("steady", model=PAIRED, steps=16, schedule="constant", eval_every=0, save_every=50, ema=0.9)
    train(steady)
    two = dataclasses.replace(steady, out=str(tmp_path / "moved"), steps=6, **grid)
    together(two)
    saved = Path(two.out) / "checkpoints" / "step-6"
    assert len(list((saved / "shards").glob("*.safetensors"))) > 1 and not list(saved.glob("model*"))
    one = dataclasses.replace(steady, out=two.out, resume=True)
    resumed = Trainer(dataclasses.replace(one, steps=6), [])
    with resumed.state.ema.applied():
        save_model(resumed.state.model, tmp_path / "alone")
    assert digest(tmp_path / "alone" / "model.safetensors") == digest(Path(two.out) / "model.safetensors")
    train(dataclasses.replace(one, steps=11))
    assert together(dataclasses.replace(one, **grid)) == pytest.approx(losses(steady), rel=2e-6)


def test_a_torn_shard_is_passed_over_with_a_message(tiny, together, recorder):
    config = tiny("torn", fsdp=2, steps=8, save_every=4)
    together(config)
    shard = next((Path(config.out) / "checkpoints" / "step-8" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    train(dataclasses.replace(config, fsdp=1, steps=9, resume=True), [recorder])
    assert any("skipped a damaged checkpoint" in note and shard.name in note for note in recorder.notes)
    assert any("resuming" in note and "step-4" in note for note in recorder.notes)


def test_rendezvous_forgets_dead_addresses(processes):
    """Processes do not wait for the dead whose addresses torchrun keep."""
    kept = store()
    assert processes(generation.main, port=kept.port, doomed=1) == [1, -signal.SIGKILL]
    assert processes(generation.main, port=kept.port, doomed=None) == [0, 0]


def test_failing_process_heard_under_torchrun(monkeypatch):
    """What a process says as it fails is heard though torchrun ends it."""

    def asked():
        signal.raise_signal(signal.SIGTERM)  # while the store is asked
        return True

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(failures, "_is_first", asked)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was ended"))
    try:
        with pytest.raises(ValueError, match="the reason"), failures.report_first_failure():
            raise ValueError("the reason")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torchrun_restart_ends_with_same_bits(tiny, together):
    """Torchrun restarts a run whose process was killed and ends with the same bits."""
    whole = tiny("whole", steps=12, save_every=4, eval_every=0, fsdp=2)
    together(whole)
    out = Path(whole.out).with_name("restarted")
    model = [f"--{name.replace('_', '-')}={value}" for name, value in whole.model.items()]
    flags = ["--tokenizer=char", "--steps=12", "--batch-size=4", "--save-every=4", "--eval-every=0", "--dtype=float32"]
    flags += ["--fsdp=2", "--sample-tokens=4", "--device=cpu", "--log-every=1", "--eval-batches=2", *model]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    launch += [str(Path(__file__).with_name("doomed.py")), "train", whole.data, f"--out={out}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "lost another" in done.stdout and "resuming from" in done.stdout and "Traceback" not in done.stdout
    assert digest(out / "model.safetensors") == digest(Path(whole.out) / "model.safetensors")
