"""Executors: other ways of computing what the model's classes define.

`Block.forward` and its parts are the definition. An executor computes the same function faster on one kind of device
(a fused training block, a decoder in C++, attention that knows its pages) or on several (tensor parallelism). Whoever
builds a model installs executors from outside, and the definition does not know them.

Each declares the configurations it computes as a `Supported`. A field that an executor does not mention must have its
default value: a field added to `ModelConfig` tomorrow is refused by every executor until somebody teaches it, and the
model falls back to the definition. Nothing is ignored in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .config import ModelConfig

_SHAPE = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
_OUTSIDE = ("position", "tie_embeddings", "rope_theta", "rope_scaling", "logit_softcap")  # of the blocks
_ROUTING = ("experts_per_token", "n_shared_experts", "router", "normalize_experts", "balance_loss", "router_z_loss")
BASIC = (*_SHAPE, *_OUTSIDE, *_ROUTING, "norm_eps", "sliding_window", "attention_softcap")
"""Fields that every executor computes: sizes, what happens outside the blocks, and what matters only to experts."""
NORMS = ("rmsnorm", "layernorm", "none")
ACTIVATIONS = ("swiglu", "gelu", "relu", "relu2")
QK_NORMS = (False, True, "none", "head")
"""None, or each head before its rotation."""


class Supported:
    """A predicate over configurations: `computed` fields may have any value, those of `only` the values listed there.

    `where` adds a condition over several fields, such as widths in whole vectors.
    """

    def __init__(
        self,
        computed: Iterable[str],
        only: Mapping[str, tuple] | None = None,
        where: Callable[[ModelConfig], bool] = lambda config: True,
    ) -> None:
        self.computed, self.only, self.where = frozenset(computed), dict(only or {}), where

    def __call__(self, config: ModelConfig) -> bool:
        return not self.refused(config) and self.where(config)

    def refused(self, config: ModelConfig) -> dict[str, Any]:
        """The fields, with their values, that this executor does not compute."""
        found = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            listed = self.only.get(field.name, (field.default,))
            if value not in listed and (field.name in self.only or field.name not in self.computed):
                found[field.name] = value
        return found
