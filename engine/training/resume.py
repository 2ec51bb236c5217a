"""What a run's next step depends on: gathered into a checkpoint, and put back from one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..formats.model_directory import read_weights, write_model
from .checkpoint import generators, load_tensors, restore_generators, snapshot
from .distributed.dcp import FOLDER, read_shards
from .distributed.sharded_state import map_optimizer, state_blocks, state_parts, whole_state
from .evaluate import Evaluation
from .report import describe

if TYPE_CHECKING:
    from .trainer import Trainer


def save_run(run: Trainer) -> None:
    """Write a checkpoint of a run: whole by the leader where one process has all, else by all, each its part."""
    if not (run.team.leads or run.team.splits_state):
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
    moments, average = run.optimizer.state_dict(), run.average.weights
    scheduler = {"loss_scale": (run.scale.value, run.scale.calm), "generators": generators()}
    if run.team.splits_state:
        copies = snapshot(state_parts(run.masters, run.optimizer, average))
        tensors = {
            "optimizer": snapshot(map_optimizer(run.masters, run.optimizer, moments, lambda *_: None)),
            "scheduler": {**scheduler, "average": dict.fromkeys(average)},
        }
        write = functools.partial(run.team.shard_writer.write, state_blocks(run.pieces, copies))
        run.checkpoints.save(run.step, tensors, state, write_shards=write)
        return
    weights = snapshot({name: p.detach() for name, p in run.masters.named.items()})
    tensors = {"optimizer": snapshot(moments), "scheduler": {**scheduler, "average": snapshot(average)}}
    config, tokenizer = run.model.config, run.materials.tokenizer

    def write_weights(directory: Path) -> None:
        write_model(config, weights.items(), torch.float32, directory, tokenizer)

    run.checkpoints.save(run.step, tensors, state, write_model=write_weights)


def resume_run(run: Trainer) -> None:
    """Put a run back to its last complete checkpoint."""
    found = run.team.told(run.checkpoints.latest(run.note) if run.team.leads else None)
    if found is None:
        run.note(f"no checkpoint to resume in {run.checkpoints.folder}: starting from the beginning")
        return
    directory, state = found
    _check_same_run(run, directory, state["run"])
    _load_state(run, directory)
    extra = load_tensors(directory, "scheduler")
    if run.config.grad_accum_steps == 0:  # the same cut gives the same bits
        run.micro_batches = state["run"]["micro_batches"]
    run.scale.value, run.scale.calm = extra["loss_scale"]
    restore_generators(extra["generators"])
    run.step, run.tokens, run.seconds = state["step"], state["tokens"], state["seconds"]
    run.bad_steps, run.bad_run = state["bad_steps"]
    run.spikes.recent.extend(state["recent_losses"])
    run.best = None if state["best"] is None else Evaluation(*state["best"])
    run.samples = state["samples"]
    done = f": all of its {run.steps} steps are done" if run.step >= run.steps else ""
    run.note(f"resuming from {directory} at step {run.step}{done}")


def _load_state(run: Trainer, directory: Path) -> None:
    """Weights, moments and averages: this process's part of each, whoever wrote them, and no more than that at once."""
    masters, pieces, moments = run.masters, run.pieces, load_tensors(directory, "optimizer")
    average = load_tensors(directory, "scheduler")["average"]
    empty = map_optimizer(masters, run.optimizer, moments, lambda name, _: torch.zeros_like(masters.named[name]))
    run.optimizer.load_state_dict(empty)
    wanted = {name: run.average.weights[name] for name in average}
    parts = state_parts(masters, run.optimizer, wanted)
    if (directory / FOLDER).is_dir():
        read_shards(directory, state_blocks(pieces, parts))
    else:
        for key, name, whole in whole_state(masters, run.optimizer, moments, average, read_weights(directory)):
            parts[key, name].copy_(pieces.part(name, whole))
            del whole
    masters.publish()


def _check_same_run(run: Trainer, directory: Path, before: dict[str, Any]) -> None:
    now = describe(run)
    for key, what in (("tokenizer_sha256", "another tokenizer"), ("train_sha256", "other training data")):
        if now["data"][key] != before["data"][key]:
            raise InputError(f"{directory} was trained with {what} than {run.materials.data.directory} holds")
    for field, value in before["model"].items():
        if now["model"][field] != value:
            raise InputError(
                f"{directory} was trained with {field}={value!r}, but this run asks for "
                f"{now['model'][field]!r}: resume with the same architecture, or choose another out"
            )
    if before["config"]["optimizer"] != run.config.optimizer:
        raise InputError(
            f"{directory} was trained with optimizer={before['config']['optimizer']!r}, not {run.config.optimizer!r}"
        )
