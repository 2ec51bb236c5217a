"""Model initialization, sharded from the start: no process ever holds the full model.

A model that is spread over processes may be larger than the memory of any of them. So it is made in three steps:

    1. its shape      every parameter on the meta device, which knows sizes and has no numbers
    2. the cut        heads, experts and slices of shapes (`parallel.py`); then memory for what is left
    3. its numbers    weight by weight: make the whole of one, keep this process's part of it, drop the rest

The numbers come from a model directory or from the seed. Each process draws all of them, in the order in which the
constructor of a whole model does, and so starts with the very bits of one process alone. Drawing costs a few seconds a
billion weights; at the worst moment a process holds its part and one module's worth of numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..formats.model_directory import read_weights
from ..model import Transformer
from . import fused_block
from .config import TrainConfig
from .distributed.mesh import ProcessMesh, apply_fsdp, apply_tp_ep
from .distributed.sharded_state import ShardedState, local


def build_model(
    config: TrainConfig, architecture: ModelConfig, mesh: ProcessMesh, dtype: torch.dtype
) -> tuple[Transformer, ShardedState]:
    """Build this process's shard of the initial model in float32, and the `ShardedState` that places it."""
    with torch.device("meta"):
        model = Transformer(architecture)
    shards = ShardedState(mesh, model)
    if not config.compile and mesh.axes["tp"] == 1:
        fused_block.install(model)
    for block in model.blocks:
        if config.activation_checkpointing:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.compile()
    model = apply_tp_ep(model, mesh)
    if mesh.axes["fsdp"] > 1:
        apply_fsdp(model, dtype, mesh)
    model.to_empty(device=mesh.device)
    torch.manual_seed(config.seed)
    fill(model, shards, read_weights(config.init_from) if config.init_from else fresh_weights(architecture))
    return model.train(), shards


@torch.no_grad()
def fill(model: Transformer, shards: ShardedState, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Copy this process's shard of each full weight into the model."""
    for name, whole in weights:
        local(model.get_parameter(name)).copy_(shards.shard(name, whole))
        del whole  # else it would stand beside the next one


def fresh_weights(architecture: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `Transformer(architecture)` would draw, bit for bit; each reuses the last one's memory."""
    with torch.device("meta"):
        model = Transformer(architecture)
    modules = [(path, module) for path, module in _as_constructed(model) if hasattr(module, "reset_parameters")]
    room = torch.empty(max(sum(p.numel() for p in module.parameters(recurse=False)) for _, module in modules))
    for path, module in modules:
        start = 0
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(room[start : start + p.numel()].view(p.shape)))
            start += p.numel()
        module.reset_parameters()
        yield from ((path + name, p.detach()) for name, p in module.named_parameters(recurse=False))


def _as_constructed(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules in the order in which they draw random numbers: children first, as `Module.apply` visits them."""
    for name, child in module.named_children():
        yield from _as_constructed(child, f"{path}{name}.")
    yield path, module
