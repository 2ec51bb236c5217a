"""Initial state of a run: loader, model, masters, optimizer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..data.loader import Loader, is_packed, open_loader
from ..data.pairs import PreferencePairs
from ..data.tokens import TokenSplit
from .build_model import build_model
from .config import TrainConfig
from .distributed.mesh import ProcessMesh, make_masters
from .inputs import RunInputs
from .lora import LoraMasters
from .mixed_precision import EMA, LossScale
from .optim import make_optimizer
from .run_state import RunState

LONGEST_ROW = 1024  # tokens, unless asked for: where TRL's trainer of conversations cuts them
ROUND = 64  # of the vectors and tiles that a row should fill


def loader_and_state(
    config: TrainConfig, inputs: RunInputs, mesh: ProcessMesh, dtype: torch.dtype
) -> tuple[Loader, RunState]:
    """Build the loader of a run and its state before the first step."""
    split = inputs.data.split("train")
    context = row_length(config, inputs, split)
    if inputs.data.meta.pairs:
        loader = PreferencePairs(split, config.batch_size, context, config.seed, kind=config.loss, beta=config.beta)
    else:
        loader = open_loader(config.order, split, config.batch_size, context, config.seed, config.stride)
    return loader, first_state(config, inputs, split, context, mesh, dtype, count_steps(config, loader))


def row_length(config: TrainConfig, inputs: RunInputs, split: TokenSplit) -> int:
    """Tokens of a row: as asked for, or as a new model can read.

    What a given model can read may be far more than the data has or a machine bears, so it gets rows for the longest
    of the documents, up to `LONGEST_ROW`; preference pairs are never longer than they are.
    """
    limit = inputs.model.max_seq_len
    if config.context or not config.init_from or inputs.data.meta.pairs:
        return config.context or limit
    limit = min(limit, LONGEST_ROW)
    if not is_packed(config.order, split):
        return limit
    longest = int(document_lengths(split).max())
    return max(1, min(limit, -(-longest // ROUND) * ROUND))


def describe_rows(context: int, inputs: RunInputs, order: str) -> str:
    """Why rows have the length that `row_length` chose, and how to have another."""
    split = inputs.data.split("train")
    told = f"rows of {context:,} tokens; the model reads {inputs.model.max_seq_len:,}"
    if not is_packed(order, split):
        return f"{told}: --context N makes them longer or shorter"
    lengths = document_lengths(split)
    if cut := int((lengths > context).sum()):
        longest = min(int(lengths.max()), inputs.model.max_seq_len)
        return (
            f"{told}: {cut:,} of {len(lengths):,} documents are cut, --context {longest} takes as much as the model can"
        )
    return f"{told}, the longest of {len(lengths):,} documents has {lengths.max():,}"


def document_lengths(split: TokenSplit) -> np.ndarray:
    """Tokens that are read of each document: all but its last."""
    return np.diff(np.append(split.starts, len(split))) - 1


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
