"""Crash test: kill a training run a hundred times, resume it each time, compare the final bits.

One run trains undisturbed. A second one is killed (SIGKILL, which no handler sees) at random moments: in a step, in the
middle of writing a checkpoint, while it evaluates or while it is still starting. Each time it is resumed in a new
process, with another number of data workers. Both must end with the same weights, optimizer state and best model, to
the last bit. The seconds are from one kill to the next: start-up, resuming, and at least one new checkpoint.
"""

import dataclasses
import hashlib
import multiprocessing
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from .harness import Machine, Options, Part
from .schema import Row, Spread

ROOMS = ("engine/training", "engine/data", "engine/model.py")
PRELOAD = ["warploom.engine.training.trainer", "warploom.tokenizer", "warploom.engine.formats.model_writer"]


def parts(options: Options) -> list[Part]:
    """A small model with dropout, so that random state matters too."""
    return [Part("100 kills", survive, {"kills": 100, "dtype": "float32"}, minutes=6)]


def survive(machine: Machine, kills: int, dtype: str) -> list[Row]:
    """Rows of the undisturbed and the killed run, and whether they end identically."""
    from ..engine.training import TrainConfig

    with TemporaryDirectory() as folder:
        data = Path(folder, "sums.txt")
        data.write_text("".join(f"{a} and {b} make {a + b}.\n" for a in range(40) for b in range(40)))
        model = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 64, "dropout": 0.1}
        whole = TrainConfig(
            data=str(data), out=f"{folder}/whole", tokenizer="char", model=model, steps=8 * kills, batch_size=8,
            save_every=3, eval_every=20, eval_batches=2, sample_tokens=0, dtype=dtype, device=machine.device,
        )  # fmt: skip
        killed = dataclasses.replace(whole, out=f"{folder}/killed")
        context = processes()
        begin = time.monotonic()
        run_once(context, whole)
        untouched = time.monotonic() - begin
        gaps = run_killed(context, killed, kills)
        expected, found = digest(whole), digest(killed)
    same = {"identical": expected == found, "sha256": found[:16], "steps": whole.steps}
    if not same["identical"]:
        raise RuntimeError(f"after {len(gaps)} kills the run ended with {found}, undisturbed with {expected}")
    return [
        Row("undisturbed", "ours", Spread.of([untouched]), extra={"kills": 0, "sha256": expected[:16]}),
        Row("killed", "ours", Spread.of(gaps), 1 / Spread.of(gaps).median, "kill", extra={"kills": len(gaps)} | same),
    ]


def processes():
    """Fork server that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def train(config) -> None:
    """Default run to kill."""
    from ..engine.training import train

    train(config)


def run_once(context, config, run=train) -> None:
    """Run to the end in a process of its own."""
    process = context.Process(target=run, args=(config,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the run in {config.out} ended with exit code {process.exitcode}")


def run_killed(context, config, kills: int, seed: int = 0, run=train) -> list[float]:
    """Kill a run up to `kills` times, then let it finish; return the seconds between kills.

    Most deaths come up to a tenth of a second after a new checkpoint, or with the next one, if that is sooner; every
    fifth one comes wherever start-up has got to.
    """
    from ..engine.training.checkpoint import Checkpoints

    draw, checkpoints, gaps = random.Random(seed), Checkpoints(Path(config.out) / "checkpoints"), []
    config = dataclasses.replace(config, resume=True)

    def await_save(process, seconds: float) -> None:
        last, end = checkpoints.steps()[:1], time.monotonic() + seconds
        while process.is_alive() and checkpoints.steps()[:1] == last and time.monotonic() < end:
            time.sleep(0.002)

    while len(gaps) < kills:
        begin = time.monotonic()
        patience = draw.random() if len(gaps) % 5 == 4 else float("inf")
        process = context.Process(target=run, args=(dataclasses.replace(config, num_workers=len(gaps) % 4),))
        process.start()
        await_save(process, patience)
        await_save(process, draw.random() * 0.1)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        gaps.append(time.monotonic() - begin)
    run_once(context, config, run)
    return gaps


def digest(config) -> str:
    """SHA-256 of the weights, optimizer state and best model (or adapter) of a finished run."""
    weights = "adapter_model.safetensors" if config.lora else "model.safetensors"
    last = Path(config.out) / "checkpoints" / f"step-{config.steps}"
    found = hashlib.sha256()
    for path in (Path(config.out) / weights, last / weights, last / "optimizer.pt"):
        found.update(path.read_bytes())
    return found.hexdigest()
