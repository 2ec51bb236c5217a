"""Initial state of a run: loader, model, masters, optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..data.loader import Loader, open_loader
from ..data.pairs import PreferencePairs
from .build_model import build_model
from .config import TrainConfig
from .distributed.mesh import ProcessMesh, make_masters
from .inputs import RunInputs
from .lora import LoraMasters
from .mixed_precision import EMA, LossScale
from .optim import make_optimizer
from .run_state import RunState


def loader_and_state(
    config: TrainConfig, inputs: RunInputs, mesh: ProcessMesh, dtype: torch.dtype
) -> tuple[Loader, RunState]:
    """Build the loader of a run and its state before the first step."""
    context = config.context or inputs.model.max_seq_len
    split = inputs.data.split("train")
    if inputs.data.meta.pairs:
        loader = PreferencePairs(split, config.batch_size, context, config.seed, kind=config.loss, beta=config.beta)
    else:
        loader = open_loader(config.order, split, config.batch_size, context, config.seed, config.stride)
    return loader, first_state(config, inputs, split, context, mesh, dtype, count_steps(config, loader))


def first_state(
    config: TrainConfig,
    inputs: RunInputs,
    split: Any,
    context: int,
    mesh: ProcessMesh,
    dtype: torch.dtype,
    steps: int,
) -> RunState:
    """Build the state of a run before the first step."""
    model, shards = build_model(config, inputs.model, mesh, dtype)
    masters = LoraMasters(model, dtype, shards, config) if config.lora else make_masters(model, dtype, mesh)
    return RunState(
        config, inputs, split, context, mesh, dtype, shards, steps, config.grad_accum_steps or 1,
        model, masters, EMA(masters, config.ema),
        make_optimizer(config, masters.named, dtype, shards.with_full_matrix), LossScale(dtype),
    )  # fmt: skip


def count_steps(config: TrainConfig, loader: Loader) -> int:
    """Number of steps of a run, from its budget (steps, epochs, tokens, minutes)."""
    if config.minutes is not None:
        return 10**9  # replaced by an estimate as soon as the pace is known
    if config.epochs is not None:
        return max(1, math.ceil(config.epochs * len(loader)))
    if config.tokens is not None:
        return max(1, math.ceil(config.tokens / (config.batch_size * loader.context)))
    return config.steps or 1000
