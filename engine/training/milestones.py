"""What a run does now and then: measure the model, keep the best, show what it writes.

All of it looks at the weights that would be saved: with `ema`, at their running average.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.tokens import TokenSplit
from ..formats.model_directory import write_model
from ..generation import generate
from .checkpoint import saving
from .distributed.sharded_state import whole_weights
from .evaluate import evaluate, validation_batches

if TYPE_CHECKING:
    from .trainer import Trainer


@contextlib.contextmanager
def averaged(run: Trainer) -> Iterator[None]:
    """Inside, the model computes with the averaged weights, if there are any."""
    if not run.average.weights:
        yield
        return
    live = {name: p.detach().clone() for name, p in run.masters.named.items()}
    run.masters.load(run.average.weights)
    try:
        yield
    finally:
        run.masters.load(live)


def validation_split(run: Trainer) -> TokenSplit | None:
    """The text to be judged by, if there is any."""
    data = run.materials.data
    split = data.split("val") if "val" in data.meta.splits else None
    return split if split is not None and len(split) >= 2 else None


def evaluate_run(run: Trainer) -> None:
    """Read the validation split (or `eval_batches` of it), and publish the weights if they are the best so far."""
    split, config = validation_split(run), run.config
    if split is None:
        return
    batches = validation_batches(split, config.batch_size, run.context, config.eval_batches)
    with averaged(run):
        found = evaluate(run.model, batches, run.bytes_of, config.batch_size // run.micro_batches // run.team.readers)
    run.tell("evaluated", run.step, found)
    if run.best is None or found.loss < run.best.loss:
        run.best = found
        publish(run)


def publish(run: Trainer) -> None:
    """Write the weights of now to OUT as a model directory."""
    weights = whole_weights(run.pieces, run.average.best_weights())
    if not run.team.leads:
        collections.deque(weights, maxlen=0)  # helps the leader to each, keeps none
        return
    with saving(f"the model to {run.out}", run.out, "resume goes on from the last checkpoint"):
        write_model(run.model.config, weights, torch.float32, run.out, run.materials.tokenizer)


def write_sample(run: Trainer) -> None:
    """Let the model continue `sample_prompt`, or the beginning of the validation text."""
    tokenizer, config = run.materials.tokenizer, run.config
    if config.sample_prompt:
        prompt = tokenizer.encode(config.sample_prompt)
    else:
        prompt = [int(token) for token in np.asarray((validation_split(run) or run.train_split).tokens[:16])]
    prompt = prompt[-(run.context // 2) :]
    was_training = run.model.training
    run.model.eval()
    with averaged(run):
        tokens = list(generate(run.model, prompt, config.sample_tokens, temperature=0.8, seed=config.seed))
    run.model.train(was_training)
    sample = {"step": run.step, "prompt": tokenizer.decode(prompt), "text": tokenizer.decode(tokens)}
    run.samples.append(sample)
    run.tell("sampled", run.step, sample["prompt"], sample["text"])
