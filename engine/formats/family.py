"""Declarative description of a model family: config.json keys to our fields, published tensors to ours, both ways.

Where a family differs from `Transformer`, the difference is a change of variables wherever possible, and stays here.
Interleaved RoPE (GPT-J, GLM, Cohere) is half-split RoPE after a permutation of the rows of q and k; packed matrices
(GPT-NeoX a head at a time, Falcon a group) are permutations too; a norm that multiplies by 1 + w (Gemma) is one by its
own weight after an addition. So no kernel has to know of them.

A family fits a configuration if reading what it would write gives the configuration back: there is no second list of
what a family can express.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError

Values = Mapping[str, Any]
TRAINING_ONLY = ("dropout", "balance_loss", "router_z_loss")  # a published config.json has no standard key for these
NEEDED = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "n_experts", "experts_per_token")
NULLABLE = (
    "sliding_window", "head_dim", "num_key_value_heads", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip
"""Keys for which null is a value; for all others it is the same as leaving the key out."""


@dataclass(frozen=True)
class Word:
    """Custom conversion of some fields: `read` maps config.json to our fields, `write` maps a configuration back."""

    read: Callable[[Values], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Description of a family: tensor names, config.json keys, fixed values, defaults, tensor layout."""

    title: str
    """The class that transformers opens it with."""
    names: Mapping[str, str | tuple[str, ...] | Callable[[ModelConfig], str]]
    """Our module → the published one. Several are concatenated by rows; * stands for the number of an expert."""
    words: dict[str, str]
    """config.json key → our field. `a|b`: either is read, both are written; `x+y`: both fields are set."""
    more: tuple[Word, ...] = ()
    """Conversions that take more than renaming a key."""
    granted: dict[str, Any] = field(default_factory=dict)
    """Our fields that are constant in this family."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """Defaults of config.json keys that a file omits."""
    refused: dict[str, tuple] = field(default_factory=dict)
    """Keys that must have one of these values; the first is written."""
    orders: dict[str, Callable[[ModelConfig], Tensor]] = field(default_factory=dict)
    """Our module → permutation of the concatenated published rows."""
    transposed: tuple[str, ...] = ()
    """Modules whose matrices are published as (inputs, outputs)."""
    framed: tuple[str, ...] = ()
    """Vectors that are published as a matrix of one row."""
    offset: float = 0.0
    """Constant added to published norm weights (1 for Gemma, whose norms multiply by 1 + w)."""
    layers: str = "model.layers"
    """Prefix of the names of the layers' tensors."""

    def read(self, values: Values) -> ModelConfig:
        """Convert a config.json to a `ModelConfig`; options that we would compute differently are refused by name."""
        said = {word for word, value in values.items() if value is not None or word in NULLABLE}
        values = {**values, **{word: value for word, value in self.assumed.items() if word not in said}}
        values = {word: value for word, value in values.items() if value is not None}
        for word, accepted in self.refused.items():
            if values.get(word) not in (*accepted, None):
                raise InputError(f"config.json: {word}={values[word]!r} is not supported (only {accepted[0]!r} is)")
        fields = dict(self.granted)
        for word, name in self.words.items():
            said = next((values[w] for w in word.split("|") if values.get(w) is not None), None)
            if said is not None:
                fields |= dict.fromkeys(name.split("+"), said)
            elif name in NEEDED and name not in fields:
                word, kind = word.split("|")[0], values["model_type"]
                raise InputError(f"config.json has no field {word!r}, which model_type {kind!r} needs")
        for word in self.more:
            fields |= word.read(values)
        if fields.get("experts_per_token") == 1 and fields.get("normalize_experts", True):
            raise InputError("config.json: top-1 routing with a weight of 1 is not supported (Switch routing is)")
        return ModelConfig(**_short(fields))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Convert a configuration to the keys of this family's config.json."""
        values = {word: accepted[0] for word, accepted in self.refused.items() if accepted[0] is not None}
        said = full(config) | {name: getattr(config, name) for name in TRAINING_ONLY}
        for word, name in self.words.items():
            values |= dict.fromkeys(word.split("|"), said[name.split("+")[0]])
        for word in self.more:
            values |= word.write(config)
        return values

    def fits(self, config: ModelConfig) -> bool:
        """Return whether a configuration survives the round trip through this family's config.json."""
        try:
            again = self.read({"model_type": "", **json.loads(json.dumps(self.write(config)))})
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            return False
        return _same(full(again), full(config))


def _same(a: Any, b: Any) -> bool:
    """Equality up to floating-point rounding: 1 / (1 / x) need not be x."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-12)
    return a == b


def full(config: ModelConfig) -> dict[str, Any]:
    """All fields resolved, none left at None: equal for two configurations that compute the same."""
    c = config
    said = c.to_dict() | {
        "n_kv_heads": c.kv_heads, "head_dim": c.head_size, "d_ff": c.ff_size, "layers": c.kinds,
        "sliding_window": c.sliding_window if "w" in c.kinds else None, "attention_scale": c.score_scale,
        "local_rope": None, "rotary_dim": c.rotary_size if c.position == "rope" else None, "bias": None,
        "dense_ff": c.ff_width(0),
        "normalize_experts": c.normalize_experts and c.experts_per_token > 1,
        **{f"{part}_bias": c.has_bias(part) for part in ("qkv", "output", "ffn")},
        "norm_bias": c.norm == "layernorm" and c.has_bias("norm"),
        "ropes": {kind: c.rope(kind) for kind in set(c.kinds)},
    }  # fmt: skip
    del said["rope_theta"], said["rope_scaling"]
    if not c.n_experts:
        for name in SPARSE_FIELDS:
            said[name] = None
    return {name: value for name, value in said.items() if name not in TRAINING_ONLY}


SPARSE_FIELDS = (
    "experts_per_token", "n_dense_layers", "dense_ff", "shared_ff", "shared_gate", "router", "router_bias",
    "choice_bias", "expert_groups", "groups_used", "expert_bias", "normalize_experts", "expert_scale",
)  # fmt: skip


def _short(fields: dict[str, Any]) -> dict[str, Any]:
    """Reset fields to None where they have the value that follows from the others."""
    f = dict(fields)
    if f.get("head_dim") == f["d_model"] / f["n_heads"]:
        f["head_dim"] = None
    size = f.get("head_dim") or f["d_model"] // f["n_heads"]
    f["rotary_dim"] = None if f.get("rotary_dim") == size else f.get("rotary_dim")
    f["attention_scale"] = None if f.get("attention_scale") == size**-0.5 else f.get("attention_scale")
    letters = f.get("layers", "")
    period = next((n for n in range(1, len(letters)) if (letters[:n] * len(letters))[: len(letters)] == letters), None)
    letters = letters[:period]
    if "w" not in letters and letters:
        f["sliding_window"] = None
    f["layers"] = "" if letters == ("w" if f.get("sliding_window") else "f") else letters
    parts = [f"{part}_bias" for part in ("qkv", "output", "ffn")] + ["norm_bias"] * (f.get("norm") == "layernorm")
    default = bool(f.get("bias", False))
    own = [bool(default if f.get(part) is None else f[part]) for part in parts]
    f["bias"] = all(own)
    f |= {"norm_bias": None} | {part: None if bias == f["bias"] else bias for part, bias in zip(parts, own)}
    if not f.get("n_dense_layers") or f.get("dense_ff") == f.get("d_ff"):
        f["dense_ff"] = None
    return f


# Tensors


@dataclass(frozen=True)
class WeightMapping:
    """Assembly of one tensor of ours from published ones: concatenation, row permutation, stacking of experts."""

    ours: str
    groups: tuple[tuple[str, ...], ...]  # one group of joined tensors, or one for each expert
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    stacked: bool = False
    order: Tensor | None = None
    """Permutation from their rows to ours."""
    offset: float = 0.0
    framed: bool = False

    def fill(self, target: Tensor, read: Callable[[str], Tensor]) -> None:
        """Copy the published tensors into our tensor, one at a time: nothing is ever held twice."""
        for part, name in self._parts(target):
            source = read(name)
            source = source[0] if self.framed and source.ndim > 1 else source.mT if self.transposed else source
            if part.shape != source.shape:
                wanted = tuple(part.mT.shape if self.transposed else part.shape)
                raise InputError(f"tensor {name} has shape {tuple(read(name).shape)}, config.json says {wanted}")
            part.copy_(source)
        if self.order is not None:
            target.copy_(target.index_select(self._rows(target), self.order.to(target.device)))
        if self.offset:
            target += self.offset

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the published tensors of one of ours: the inverse of `fill`."""
        if self.order is not None:
            tensor = tensor.index_select(self._rows(tensor), self.order.argsort().to(tensor.device))
        if self.offset:
            tensor = tensor - self.offset
        for part, name in self._parts(tensor):
            yield name, (part[None] if self.framed else part.mT if self.transposed else part).contiguous()

    def _rows(self, tensor: Tensor) -> int:
        """Dimension of a tensor's rows: 1 behind the expert dimension, else 0."""
        return 1 if tensor.ndim == 3 or "b_gate_up" in self.ours else 0

    def _parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, str]]:
        members = tensor.unbind(0) if self.stacked else (tensor,)
        for member, names in zip(members, self.groups):
            parts = member.split(self.sizes) if len(names) > 1 else (member,)
            yield from zip(parts, names)

    @property
    def theirs(self) -> list[str]:
        return [name for group in self.groups for name in group]


def mapping_of(family: Family, config: ModelConfig, name: str) -> WeightMapping:
    """The mapping of our tensor of this name."""
    c = config
    layer, part, kind = dissect(name)
    published = family.names[part]
    published = published(c) if callable(published) else published
    prefix, suffix = "" if layer is None else f"{family.layers}.{layer}.", f".{kind}" if kind else ""
    names = tuple(f"{prefix}{x}{suffix}" for x in ((published,) if isinstance(published, str) else published))
    stacked = "*" in names[0]
    copies = range(c.n_experts) if stacked else (0,)
    groups = tuple(tuple(x.replace("*", str(number)) for x in names) for number in copies)
    order = family.orders.get(part)
    norm = kind == "weight" and part.endswith(("norm", "_post"))
    return WeightMapping(
        name, groups, _sizes(c, part, layer) if len(names) > 1 else (), part in family.transposed and kind != "bias",
        stacked, None if order is None else order(c), family.offset if norm else 0.0, part in family.framed,
    )  # fmt: skip


def _sizes(c: ModelConfig, part: str, layer: str | None) -> tuple[int, ...]:
    if part == "attention.qkv":
        return tuple(heads * c.head_size for heads in (c.n_heads, c.kv_heads, c.kv_heads))
    if part == "ffn.gate_up":
        return (c.ff_width(int(layer)),) * 2
    return (c.shared_ff if "shared" in part else c.ff_size,) * 2


def dissect(name: str) -> tuple[str | None, str, str]:
    """Split a tensor name: blocks.3.attention.qkv.weight → ("3", "attention.qkv", "weight")."""
    layer = None
    if name.startswith("blocks."):
        _, layer, name = name.split(".", 2)
    path, _, kind = name.rpartition(".")
    return (layer, path, kind) if kind in ("weight", "bias") else (layer, name, "")
