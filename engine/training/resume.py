"""Saving and resuming a run: `RunState` into a checkpoint and back, and its weights into a model directory."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..errors import InputError
from .checkpoint import Checkpoints, load_tensors, restore_rng_state, rng_state, saving, snapshot
from .config import LORA
from .distributed.dcp import FOLDER, read_shards
from .distributed.sharded_state import full_weights, map_optimizer, state_blocks, state_parts, whole_state
from .evaluate import Evaluation
from .report import describe
from .run_state import RunState


def save_run(run: RunState, checkpoints: Checkpoints) -> None:
    """Write a checkpoint of a run: by the main process alone if it holds everything, else a shard by each process."""
    if not (run.mesh.is_main or run.mesh.is_sharded):
        return
    state = {
        "tokens": run.tokens,
        "seconds": run.seconds,
        "bad_steps": [run.bad_steps, run.bad_run],
        "recent_losses": list(run.spikes.recent),
        "best": None if run.best is None else [run.best.loss, run.best.bits_per_byte, run.best.tokens],
        "samples": run.samples,
        "run": describe(run),
    }
    moments, average = run.optimizer.state_dict(), run.ema.weights
    scheduler = {"loss_scale": (run.loss_scale.value, run.loss_scale.calm), "generators": rng_state()}
    if run.mesh.is_sharded:
        copies = snapshot(state_parts(run.masters, run.optimizer, average))
        tensors = {
            "optimizer": snapshot(map_optimizer(run.masters, run.optimizer, moments, lambda *_: None)),
            "scheduler": {**scheduler, "average": dict.fromkeys(average)},
        }
        write = functools.partial(run.mesh.shard_writer.write, state_blocks(run.shards, copies))
        checkpoints.save(run.step, tensors, state, write_shards=write)
        return
    weights = snapshot({name: p.detach() for name, p in run.masters.named.items()})
    tensors = {"optimizer": snapshot(moments), "scheduler": {**scheduler, "average": snapshot(average)}}
    masters, tokenizer = run.masters, run.inputs.tokenizer

    def write_copies(directory: Path) -> None:
        masters.write(directory, weights.items(), tokenizer)

    checkpoints.save(run.step, tensors, state, write_model=write_copies)


def write_weights(run: RunState, out: Path) -> None:
    """Write the current weights (or their EMA) as a model directory."""
    weights = full_weights(run.shards, run.ema.best_weights())
    if not run.mesh.is_main:
        collections.deque(weights, maxlen=0)  # takes part in gathering each, keeps none
        return
    with saving(f"the model to {out}", out, "resume goes on from the last checkpoint"):
        run.masters.write(out, weights, run.inputs.tokenizer)


def resume_run(run: RunState, checkpoints: Checkpoints, note: Callable[[str], None]) -> None:
    """Restore a run from its last complete checkpoint."""
    found = run.mesh.broadcast(checkpoints.latest(note) if run.mesh.is_main else None)
    if found is None:
        note(f"no checkpoint to resume in {checkpoints.folder}: starting from the beginning")
        return
    directory, state = found
    _check_same_run(run, directory, state["run"])
    _load_state(run, directory)
    extra = load_tensors(directory, "scheduler")
    if run.config.grad_accum_steps == 0:  # the same cut gives the same bits
        run.grad_accum_steps = state["run"]["micro_batches"]
    run.loss_scale.value, run.loss_scale.calm = extra["loss_scale"]
    restore_rng_state(extra["generators"])
    run.step, run.tokens, run.seconds = state["step"], state["tokens"], state["seconds"]
    run.bad_steps, run.bad_run = state["bad_steps"]
    run.spikes.recent.extend(state["recent_losses"])
    run.best = None if state["best"] is None else Evaluation(*state["best"])
    run.samples = state["samples"]
    done = f": all of its {run.steps} steps are done" if run.step >= run.steps else ""
    note(f"resuming from {directory} at step {run.step}{done}")


def _load_state(run: RunState, directory: Path) -> None:
    """Load this process's shards of weights, moments and averages, from checkpoints of any process mesh."""
    masters, shards, moments = run.masters, run.shards, load_tensors(directory, "optimizer")
    average = load_tensors(directory, "scheduler")["average"]
    empty = map_optimizer(masters, run.optimizer, moments, lambda name, _: torch.zeros_like(masters.named[name]))
    run.optimizer.load_state_dict(empty)
    wanted = {name: run.ema.weights[name] for name in average}
    parts = state_parts(masters, run.optimizer, wanted)
    if (directory / FOLDER).is_dir():
        read_shards(directory, state_blocks(shards, parts))
    else:
        for key, name, whole in whole_state(masters, run.optimizer, moments, average, masters.read(directory)):
            parts[key, name].copy_(shards.shard(name, whole))
            del whole
    masters.copy_to_model()


def _check_same_run(run: RunState, directory: Path, before: dict[str, Any]) -> None:
    now = describe(run)
    for key, what in (("tokenizer_sha256", "another tokenizer"), ("train_sha256", "other training data")):
        if now["data"][key] != before["data"][key]:
            raise InputError(f"{directory} was trained with {what} than {run.inputs.data.directory} holds")
    for field, value in ModelConfig.from_dict(before["model"]).to_dict().items():
        if now["model"][field] != value:
            raise InputError(
                f"{directory} was trained with {field}={value!r}, but this run asks for "
                f"{now['model'][field]!r}: resume with the same architecture, or choose another out"
            )
    for name in ("optimizer", "tokenizer", *LORA):
        then, asked = before["config"].get(name), now["config"][name]
        if name in before["config"] and (tuple(then) if isinstance(then, list) else then) != asked:
            raise InputError(f"{directory} was trained with {name}={then!r}, not {asked!r}")
