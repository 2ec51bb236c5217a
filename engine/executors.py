"""Executors: alternative implementations of `Block.forward` and its parts, each with the configurations it supports.

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

SHAPE = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
OUTSIDE = ("position", "tie_embeddings", "rope_theta", "rope_scaling", "logit_softcap")
"""Fields of what `Transformer` computes before the first block and after the last."""
SCALED = ("embedding_scale", "logit_scale", "head_bias")
"""The same, for those that leave the embedding and the head to it."""
ROUTING = (
    "experts_per_token", "n_dense_layers", "dense_ff", "shared_ff", "shared_gate", "router", "router_bias",
    "choice_bias", "expert_groups", "groups_used", "expert_bias", "normalize_experts", "expert_scale", "balance_loss",
    "router_z_loss",
)  # fmt: skip
"""Fields that matter only where there are experts."""
STREAM = ("norm", "norm_eps", "norm_place", "norm_bias", "residual", "residual_scale", "dropout")
"""Fields of how sublayers read the stream and join it."""
WINDOWS = ("layers", "local_rope", "sliding_window", "attention_softcap", "attention_scale")
"""Fields that the attention that is asked and the rotation that is given know for all."""
BIASES = ("bias", "qkv_bias", "output_bias", "ffn_bias", "norm_bias")
LATENT = ("kv_rank", "q_rank", "rope_dim", "value_dim")
"""Fields of latent attention."""


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
        """The fields, with their values, that this executor does not support."""
        found = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            listed = self.only.get(field.name, (field.default,))
            if value not in listed and (field.name in self.only or field.name not in self.computed):
                found[field.name] = value
        return found
