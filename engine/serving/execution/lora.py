"""Several LoRA adapters in one batch: a layer adds to each token the change of the adapter that its row asked for.

    y = W x + s·B·(A x)

Merged, an adapter takes a copy of the weights, and rows of different adapters could not share a product (that is what
a directory of an adapter does that is served as a model: one adapter, at the speed of a plain model). Here all rows go
through the base's product, and the tokens of each adapter through two narrow ones beside it (S-LoRA's and Punica's
idea). Those are batch-invariant too and see that adapter's tokens alone: a row's bits do not depend on its company.

With adapters, layers run one by one: the C++ executor of whole models and recorded GPU graphs know none.

T tokens of the step, R rank, over all layers packed in a weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

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
    directories: Mapping[str, str | os.PathLike], model: str | os.PathLike | Transformer
) -> dict[str, Adapter]:
    """Adapters by name, each held against the model that is served, whatever base they say they have."""
    found = {}
    for name, directory in directories.items():
        try:
            if isinstance(model, Transformer):
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
    """The adapters of a model by name, and which tokens of the step under way are theirs."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.tokens: list[tuple[str, Tensor | slice]] = []

    def begin_step(self, names: Iterable[str | None], counts: Iterable[int], device: torch.device) -> None:
        """Take in the adapter of each chunk of a step, and how many tokens it has."""
        tokens: dict[str, list[int]] = {}
        start = 0
        for name, count in zip(names, counts):
            if name is not None:
                tokens.setdefault(name, []).extend(range(start, start + count))
            start += count
        self.tokens = [(name, _places(where, device)) for name, where in tokens.items()]

    def install(
        self, served: Transformer, model: Transformer, linear: Callable[[Tensor, Transformer], nn.Module]
    ) -> Transformer:
        """The model with the layers wrapped that some adapter changes; the original stays as it is.

        `linear` makes the products with factors.
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


class AdaptedLinear(nn.Module):
    """A linear layer as it is served, and what adapters add to it."""

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


def _places(tokens: list[int], device: torch.device) -> Tensor | slice:
    """Places of tokens; side by side, they need no copy."""
    if tokens[-1] - tokens[0] == len(tokens) - 1:
        return slice(tokens[0], tokens[-1] + 1)
    return torch.tensor(tokens, device=device)


def _products(adapter: Adapter, name: str, linear: Callable[[Tensor], nn.Module]) -> Products:
    """The two products of an adapter for a weight: of all layers packed in it at once."""
    weight = adapter.weights[name]
    factors = [adapter.factors.get(part) for layer in weight.layers for part in factor_names(layer)]
    downs = [a for a in factors[::2] if a is not None]
    ups = []
    for layer, a, b, size in zip(weight.layers, factors[::2], factors[1::2], weight.sizes):
        ups.append(torch.zeros(size, 0) if a is None else b * adapter.scales[layer])
    up = torch.block_diag(*ups)
    up = up if weight.order is None else up[weight.order]
    return linear(torch.cat(downs)), linear(up)
