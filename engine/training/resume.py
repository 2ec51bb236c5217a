"""What a run's next step depends on: gathered into a checkpoint, and put back from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..hub import load_model, save_model
from .card import describe
from .checkpoint import generators, load_tensors, restore_generators, snapshot
from .evaluate import Evaluation
from .pieces import map_optimizer, whole_weights
from .precision import assembled

if TYPE_CHECKING:
    from .trainer import Trainer


def save_run(run: Trainer) -> None:
    """Write a checkpoint of a run: every process contributes its part, the leader writes."""
    weights = {name: p.detach() for name, p in run.masters.named.items()}
    weights = snapshot(whole_weights(run.pieces, weights))
    whole = map_optimizer(
        run.masters, run.optimizer, run.optimizer.state_dict(), lambda name, _, part: run.pieces.whole(name, part)
    )
    tensors = {
        "optimizer": snapshot(whole),
        "scheduler": {
            "loss_scale": (run.scale.value, run.scale.calm),
            "average": snapshot(whole_weights(run.pieces, run.average.weights)),
            "generators": generators(),
        },
    }
    if not run.team.leads:
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
    model, tokenizer = assembled(run.model, weights), run.materials.tokenizer
    run.checkpoints.save(run.step, lambda directory: save_model(model, directory, tokenizer), tensors, state)


def resume_run(run: Trainer) -> None:
    """Put a run back to its last complete checkpoint."""
    found = run.checkpoints.latest(run.note)
    if found is None:
        run.note(f"no checkpoint to resume in {run.checkpoints.folder}: starting from the beginning")
        return
    directory, state = found
    _check_same_run(run, directory, state["run"])
    saved, _ = load_model(directory, device="cpu", dtype=torch.float32)
    run.masters.load({name: run.pieces.part(name, p) for name, p in saved.named_parameters()})
    moments = load_tensors(directory, "optimizer")
    run.optimizer.load_state_dict(
        map_optimizer(run.masters, run.optimizer, moments, lambda name, _, whole: run.pieces.part(name, whole))
    )
    extra = load_tensors(directory, "scheduler")
    if run.config.grad_accum_steps == 0:  # the same cut gives the same bits
        run.micro_batches = state["run"]["micro_batches"]
    run.scale.value, run.scale.calm = extra["loss_scale"]
    for name, weight in extra["average"].items():
        run.average.weights[name].copy_(run.pieces.part(name, weight))
    restore_generators(extra["generators"])
    run.step, run.tokens, run.seconds = state["step"], state["tokens"], state["seconds"]
    run.bad_steps, run.bad_run = state["bad_steps"]
    run.spikes.recent.extend(state["recent_losses"])
    run.best = None if state["best"] is None else Evaluation(*state["best"])
    run.samples = state["samples"]
    run.note(f"resuming from {directory} at step {run.step}")


def _check_same_run(run: Trainer, directory: Path, before: dict[str, Any]) -> None:
    now = describe(run)
    for field, value in before["model"].items():
        if now["model"][field] != value:
            raise ValueError(
                f"{directory} was trained with {field}={value!r}, but this run asks for "
                f"{now['model'][field]!r}: resume with the same architecture, or choose another out"
            )
    for key, what in (("tokenizer_sha256", "another tokenizer"), ("train_sha256", "other training data")):
        if now["data"][key] != before["data"][key]:
            raise ValueError(f"{directory} was trained with {what} than {run.materials.data.directory} holds")
    if before["config"]["optimizer"] != run.config.optimizer:
        raise ValueError(
            f"{directory} was trained with optimizer={before['config']['optimizer']!r}, not {run.config.optimizer!r}"
        )
