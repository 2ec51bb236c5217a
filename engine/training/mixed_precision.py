"""Mixed precision: compute in bfloat16 or float16, float32 master weights, loss scaling, EMA.

A matrix product in bfloat16 is several times faster, and its inputs need no more precision. A weight does: an update a
thousandth of its size is lost in bfloat16's eight bits. So the model's own weights are rounded copies, and float32
*masters* are what the optimizer sees. Gradients leave the rounded weights as soon as they are complete and add up in
float32, so accumulating micro-batches loses nothing. After each step the masters are copied to the model.

In float32 the masters are the model's weights themselves, and nothing is copied.

float16 has too little range for small gradients: the loss is multiplied by `LossScale.value` before the backward pass
and the gradients divided by it afterwards. The scale halves when a gradient overflows and doubles after many finite
steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.model_directory import read_weights
from ..formats.model_writer import write_model
from ..model import Transformer
from ..parallel.tensor_parallel import shard_specs


class Masters:
    """Float32 master weights, by name, of a model that computes in `dtype`."""

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.specs = model, dtype, shard_specs(model)
        self.named: dict[str, Tensor] = dict(model.named_parameters())
        self._rounded = list(self.named.values())
        if dtype == torch.float32:
            return
        self.named = {name: p.detach().requires_grad_() for name, p in self.named.items()}
        model.to(dtype)  # gives the model other numbers, and leaves the masters theirs
        for p, master in zip(self._rounded, self.named.values()):
            p.register_post_accumulate_grad_hook(_collector(master))

    def made_from(self, name: str) -> list[str]:
        """Names of the masters that get their gradients from the model's parameter of this name."""
        return [name]

    @property
    def separate(self) -> bool:
        return self.dtype != torch.float32

    @torch.no_grad()
    def copy_to_model(self, but: Container[Tensor] = ()) -> None:
        """Copy the masters, rounded to `dtype`, into the model, except those in `but` (already copied)."""
        if not self.separate:
            return
        pairs = [(p, master) for p, master in zip(self._rounded, self.named.values()) if master not in but]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [master for _, master in pairs])

    def copies(self, smallest: int) -> dict[Tensor, Tensor]:
        """Large masters on a GPU (at least `smallest` weights) → the model's copies of them, for fused updates."""
        pairs = zip(self._rounded, self.named.values())
        return {master: p for p, master in pairs if master.is_cuda and master.numel() >= smallest}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Load weights by name; of sharded runs, this process's shards."""
        for name, master in self.named.items():
            master.copy_(weights[name])
        self.copy_to_model()

    def write(self, directory: Path, weights: Iterable[tuple[str, Tensor]], tokenizer: Any) -> None:
        """Write weights by name as a model directory."""
        write_model(self.model.config, weights, torch.float32, directory, tokenizer)

    def read(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that `write` wrote, by name."""
        return read_weights(directory)

    def zero_grad(self) -> None:
        for master in self.named.values():
            master.grad = None


def _collector(master: Tensor):
    def collect(p: Tensor) -> None:
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad.add_(p.grad)
        p.grad = None

    return collect


class LossScale:
    """Dynamic loss scaling for float16; 1 for other dtypes."""

    def __init__(self, dtype: torch.dtype, patience: int = 1000) -> None:
        self.active = dtype == torch.float16
        self.value = 2.0**15 if self.active else 1.0
        self.patience, self.calm = patience, 0

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step with finite or overflowing gradients."""
        if not self.active:
            return
        self.calm = self.calm + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.calm == self.patience:
            self.value, self.calm = self.value * 2, 0

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.active and grads:
            torch._foreach_mul_(grads, 1 / self.value)


class EMA:
    """Exponential moving average (EMA) of the weights, over about 1/(1-decay) steps."""

    def __init__(self, masters: Masters, decay: float) -> None:
        self.masters, self.decay = masters, decay
        self.weights = {name: p.detach().clone() for name, p in masters.named.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        if self.weights:
            live = [self.masters.named[name].detach() for name in self.weights]
            torch._foreach_lerp_(list(self.weights.values()), live, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights, if there are any."""
        if not self.weights:
            yield
            return
        live = {name: p.detach().clone() for name, p in self.masters.named.items()}
        self.masters.load(self.weights)
        try:
            yield
        finally:
            self.masters.load(live)

    def best_weights(self) -> dict[str, Tensor]:
        """Weights to evaluate and save: the average if there is one, else the masters."""
        return self.weights or {name: p.detach() for name, p in self.masters.named.items()}
