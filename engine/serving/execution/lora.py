"""Multi-LoRA serving: several adapters in one batch (S-LoRA, Punica).

    y = W x + s·B·(A x)

Merged, an adapter takes a copy of the weights, and rows of different adapters could not share a product (that is what
a directory of an adapter does that is served as a model: one adapter, at the speed of a plain model). Here all rows go
through the base's product, and the tokens of each adapter through two narrow ones beside it (S-LoRA's and Punica's
idea). Those are batch-invariant too: a row's bits do not depend on the rest of the batch.

The C++ executor of whole models has these products in its call (csrc/cpu/serving/low_rank.hpp); elsewhere layers are
wrapped and run one by one, for recorded GPU graphs know no adapters.

T tokens of the step, R rank, over all layers packed in a weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError
from ...formats.adapters import Adapter, factor_names
from ...formats.families import architecture_of
from ...formats.model_directory import open_adapter
from ...formats.model_source import resolve_model
from ...model import Transformer
from .gpu_model import shallow_copy

Products = tuple[nn.Module, nn.Module]  # A x and s·B z


def open_adapters(
    directories: Mapping[str, str | os.PathLike | Adapter], model: str | os.PathLike | Transformer
) -> dict[str, Adapter]:
    """Open adapters by name, each checked against the served model, whatever base it names."""
    found = {}
    for name, directory in directories.items():
        try:
            if isinstance(directory, Adapter):
                adapter = directory
            elif isinstance(model, Transformer):
                adapter = Adapter(resolve_model(directory), model.config, architecture_of(model.config))
            else:
                adapter = open_adapter(directory, model)
        except InputError as error:
            raise InputError(f"adapter {name!r}: {error}") from None
        if adapter.whole:
            raise InputError(f"adapter {name!r} has an embedding of its own: merge it, or serve its directory as model")
        found[name] = adapter
    return found


class ServedAdapters:
    """Registry of a model's adapters, and which tokens of the current step belong to which."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.numbers = {name: number for number, name in enumerate(self.adapters)}
        self.chosen_T: Tensor | None = None
        self.tokens: list[tuple[str, Tensor | slice]] = []

    def begin_step(self, names: Iterable[str | None], counts: Sequence[int], device: torch.device) -> None:
        """Set the adapter and token count of each chunk of the step."""
        numbers = [-1 if name is None else self.numbers[name] for name in names]
        chosen_T = np.repeat(np.array(numbers, dtype=np.int32), counts)
        used = {name: number for name, number in self.numbers.items() if number in numbers}
        self.chosen_T = torch.from_numpy(chosen_T) if used else None
        self.tokens = [(name, _places(np.flatnonzero(chosen_T == n), device)) for name, n in used.items()]

    def install(
        self, served: Transformer, model: Transformer, linear: Callable[[Tensor, Transformer], nn.Module]
    ) -> Transformer:
        """Wrap the layers that some adapter changes; the original model is untouched.

        `linear` makes the layers for the factors.
        """
        served = shallow_copy(served) if served is model else served
        changed = {name for adapter in self.adapters.values() for name in adapter.weights}
        for name in sorted(changed):
            path = name.removeprefix("blocks.").removesuffix(".weight")
            products = {
                key: _products(adapter, name, lambda w: linear(w, model))
                for key, adapter in self.adapters.items()
                if name in adapter
            }
            served.blocks.set_submodule(path, AdaptedLinear(served.blocks.get_submodule(path), products, self))
        return served

    def low_rank(self, name: str, make: Callable) -> list:
        """C++ factors of a weight for each adapter, made by `make`; None for adapters that do not change it."""
        return [make(*_factors(adapter, name)) if name in adapter else None for adapter in self.adapters.values()]


class AdaptedLinear(nn.Module):
    """Linear layer plus the LoRA updates of the adapters in the batch."""

    def __init__(self, linear: nn.Module, products: dict[str, Products], step: ServedAdapters) -> None:
        super().__init__()
        self.linear, self.products, self.step = linear, products, step

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        x_TC, y_TF = x.flatten(0, -2), y.flatten(0, -2)
        for name, tokens in self.step.tokens:
            if name in self.products:
                down, up = self.products[name]
                y_TF[tokens] += up(down(x_TC[tokens])).to(y.dtype)
        return y_TF.view(y.shape)


def _places(tokens: np.ndarray, device: torch.device) -> Tensor | slice:
    """Indices of an adapter's tokens; a slice if contiguous, which needs no gather."""
    if tokens[-1] - tokens[0] == len(tokens) - 1:
        return slice(tokens[0], tokens[-1] + 1)
    return torch.from_numpy(tokens).to(device)


def _factors(adapter: Adapter, name: str) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
    """Stacked A of the layers packed in a weight; s·B of each with its first row and its offset in A x."""
    weight, downs, ups = adapter.weights[name], [], []
    row = rank = 0
    for layer, size in zip(weight.layers, weight.sizes):
        a, b = (adapter.factors.get(part) for part in factor_names(layer))
        if a is not None and b is not None:
            downs.append(a)
            ups.append((row, rank, b * adapter.scales[layer]))
            rank += len(a)
        row += size
    down = torch.cat(downs)
    if weight.order is not None:  # rows of all layers lie mixed
        ups = [(0, 0, _joined(ups, row, rank)[weight.order])]
    return down, ups


def _joined(ups: list[tuple[int, int, Tensor]], rows: int, ranks: int) -> Tensor:
    up = torch.zeros(rows, ranks)
    for row, rank, b in ups:
        up[row : row + b.shape[0], rank : rank + b.shape[1]] = b
    return up


def _products(adapter: Adapter, name: str, linear: Callable[[Tensor], nn.Module]) -> Products:
    """The two LoRA products of a weight, over all layers packed in it."""
    down, ups = _factors(adapter, name)
    return linear(down), linear(_joined(ups, adapter.weights[name].shape[0], len(down)))
