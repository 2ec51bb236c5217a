"""LoRA masters: the optimizer updates the factors A and B; the model holds W + s·B·A.

Masters are float32 numbers from which the model's weights are made after each step (`mixed_precision.py`). Nothing
says that they must be those weights themselves. Here they are an adapter's factors, and making the weights is adding
s·B·A to the base's. So no line of the model changes, fused blocks and servers compute with ordinary weights, and a
merged model has the very bits that were trained. Gradients of A and B follow from the weight's by the chain rule, as
soon as it is complete.

The price: the gradient of each adapted weight is formed, which PEFT avoids; and both W and W + s·B·A are held. The gain
on a CPU: products as large as the model's, not r columns wide. Without moments and float32 copies of all weights, a
run in bfloat16 takes 4 bytes a parameter where full training takes 18.

Factors are small, and every process has them whole. Where FSDP slices a weight, a process gets its slice of the
gradient, and what follows from it for A and B is its share of their gradients: the sum over processes is all of it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from ..formats.adapters import WHOLE, AdapterConfig, LowRank, choose_layers, factor_names, low_rank_weights
from ..formats.families import weight_map
from ..formats.model_directory import base_sample, open_adapter
from ..formats.model_info import base_of, kind_in
from ..formats.model_source import resolve_model
from ..formats.model_writer import write_adapter
from ..model import Transformer
from ..parallel.tensor_parallel import ShardSpec, shard_specs
from .config import TrainConfig
from .distributed.sharded_state import ShardedState, local
from .mixed_precision import Masters


class LoraMasters(Masters):
    """Masters of a LoRA run: the factors, and embedding and head where they are trained whole."""

    separate = True

    def __init__(self, model: Transformer, dtype: torch.dtype, shards: ShardedState, config: TrainConfig) -> None:
        self.model, self.dtype, self.shards = model, dtype, shards
        self.kind = kind_in(config.init_from)
        weights = low_rank_weights(model.config, self.kind)
        layers = choose_layers(weights, config.lora_targets)
        self.adapter = adapter_config(config, model.config, layers, self.kind)
        self.scales = dict.fromkeys(layers, self.adapter.scale("", config.lora))
        self.adapted = {w.weight: w for w in weights if not self.scales.keys().isdisjoint(w.layers)}
        parameters = dict(model.named_parameters())
        whole = [name for name in WHOLE if config.lora_embeddings and name in parameters]
        self.base = {name: _narrow(local(parameters[name].detach()), dtype) for name in self.adapted}
        self.factors = fresh_factors(self.adapted.values(), layers, config.lora, config.seed)
        self.factors = {name: factor.to(model.device).requires_grad_() for name, factor in self.factors.items()}
        self.named = self.factors | {name: local(parameters[name].detach()).requires_grad_() for name in whole}
        shards.add_whole(self.factors)
        self.specs = shard_specs(model) | dict.fromkeys(self.factors, ShardSpec(stream=None))
        for name, p in parameters.items():
            p.requires_grad_(name in self.adapted or name in whole)
        if dtype != torch.float32 and not shards.mesh.axes["fsdp"] > 1:  # FSDP rounds what it gathers
            model.to(dtype)
        self._parameters = dict(model.named_parameters())
        for name in (*self.adapted, *whole):
            self._parameters[name].register_post_accumulate_grad_hook(functools.partial(self._collect, name))

    def made_from(self, name: str) -> list[str]:
        if name in self.adapted:
            names = (part for layer in self.adapted[name].layers for part in factor_names(layer))
            return [part for part in names if part in self.factors]
        return [name]

    @torch.no_grad()
    def copy_to_model(self, but: Container[Tensor] = ()) -> None:
        """Merge: write W + s·B·A into the model's weights."""
        for name, weight in self.adapted.items():
            change = self.shards.shard(name, weight.change(self.factors, self.scales))
            local(self._parameters[name]).copy_(self.base[name] + change)
        for name in self.named.keys() - self.factors.keys():
            local(self._parameters[name]).copy_(self.named[name])

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Context in which the model has the base's weights (adapter off)."""
        for name in self.adapted:
            _copy(self._parameters[name], self.base[name])
        try:
            yield
        finally:
            self.copy_to_model()

    @torch.no_grad()
    def _collect(self, name: str, p: Tensor) -> None:
        """Gradient hook of a weight: accumulate the gradients of its factors by the chain rule."""
        grad, p.grad = local(p.grad).float(), None
        if name not in self.adapted:
            return self._add(name, grad)
        weight = self.adapted[name]
        if grad.shape != weight.shape:  # a slice: the rest is other processes'
            slice_, grad = grad, grad.new_zeros(weight.shape)
            self.shards.shard(name, grad).copy_(slice_)
        for part, made in weight.gradients(grad, self.factors, self.scales):
            self._add(part, made)

    def _add(self, name: str, grad: Tensor) -> None:
        master = self.named[name]
        master.grad = grad if master.grad is None else master.grad.add_(grad)

    def write(self, directory: Path, weights: Iterable[tuple[str, Tensor]], tokenizer: Any) -> None:
        """Write the adapter as a directory that PEFT opens."""
        config = self.model.config
        write_adapter(self.adapter, config, self.kind, _with_tied_head(weights, config), directory, tokenizer)

    def read(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        adapter = open_adapter(directory)
        held = adapter.factors | adapter.whole
        return ((name, held[name]) for name in self.named)


def adapter_config(config: TrainConfig, model: ModelConfig, layers: list[str], kind: str) -> AdapterConfig:
    """`AdapterConfig` of a run."""
    base = resolve_model(config.init_from, weights=False)
    if base_of(base, weights=False) != base:
        raise InputError(f"{config.init_from} is an adapter itself: merge it first, by warploom export --merge")
    local_path = Path(config.init_from).exists()
    targets = config.lora_targets or tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    saved = [weight_map(model, [name], kind)[0].theirs[0] for name in WHOLE if config.lora_embeddings]
    saved = tuple(name.removesuffix(".weight").rpartition(".")[2] for name in saved)
    return AdapterConfig(
        str(base.resolve()) if local_path else config.init_from, config.lora,
        2 * config.lora if config.lora_alpha is None else config.lora_alpha, config.lora_rslora, targets, saved,
        sample=base_sample(base),
    )  # fmt: skip


def fresh_factors(weights: Iterable[LowRank], layers: list[str], rank: int, seed: int) -> dict[str, Tensor]:
    """Initial factors: A uniform within 1/√inputs (PEFT's initialization), B zero, so that the model is unchanged."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for weight in weights:
        for layer, outputs in zip(weight.layers, weight.sizes):
            if layer in layers:
                name_a, name_b = factor_names(layer)
                bound = 1 / math.sqrt(weight.shape[1])
                factors[name_a] = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
                factors[name_b] = torch.zeros(outputs, rank)
    return factors


@torch.no_grad()
def _copy(p: Tensor, numbers: Tensor) -> None:
    local(p).copy_(numbers)


def _narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy of a base weight, in the run's dtype where that is lossless."""
    narrow = weight.to(dtype, copy=True)
    return narrow if torch.equal(narrow.float(), weight) else weight.clone()


def _with_tied_head(weights: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Tensors with a tied embedding given twice: PEFT saves one for each of its modules_to_save."""
    for name, tensor in weights:
        yield name, tensor
        if name == WHOLE[0] and config.tie_embeddings:
            yield WHOLE[1], tensor.clone()  # safetensors writes no memory twice
