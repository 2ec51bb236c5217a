"""Conversion to and from `transformers`: config.json and tensor names of every supported model family.

Every published architecture names things in its own way: `transformers` says `hidden_size` where we say `d_model`,
stores q, k and v apart where we multiply once, and transposes GPT-2. `family_table.py` is the table of differences;
here are its uses: `to_hf_config(config)` gives the published `config.json`, `from_hf_config(values)` reads
one back, and `weight_map(config)` lists, for each tensor of ours, the published tensors it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..config import ModelConfig
from ..errors import InputError
from .family import TRAINING_ONLY, Family, WeightMapping, mapping_of
from .family_table import ALIASES, FAMILIES


def architecture_of(config: ModelConfig) -> str:
    """`model_type` of the first family whose config.json round-trips this configuration; else "warploom"."""
    return next((kind for kind, family in FAMILIES.items() if family.fits(config)), "warploom")


def kind_of(values: Mapping[str, Any]) -> str:
    """The `model_type` of a config.json, aliases resolved; an unsupported one is refused."""
    kind = language_part(values).get("model_type")
    known = ALIASES.get(kind, kind)
    if known not in FAMILIES and kind != "warploom":
        names = ", ".join(FAMILIES)
        raise InputError(f"config.json: model_type {kind!r} is not supported; supported: {names}, warploom")
    return known


# config.json


def to_hf_config(config: ModelConfig, kind: str | None = None) -> dict[str, Any]:
    """Convert to the family's config.json; our own (`model_type: warploom`) if no family fits."""
    kind = kind or architecture_of(config)
    if kind == "warploom":
        return {"model_type": kind, "architectures": ["Transformer"], "warploom": config.to_dict()}
    family = FAMILIES[kind]
    extras = {name: getattr(config, name) for name in TRAINING_ONLY}
    names = {"model_type": kind, "architectures": [family.title]}
    # Some classes assume a padding token past a small vocabulary, and then cannot be built.
    return {**names, **family.write(config), "pad_token_id": None, "warploom": extras}


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Convert a config.json to a `ModelConfig`; options that we would compute differently are refused by name."""
    kind = kind_of(values)
    if kind == "warploom":
        return ModelConfig.from_dict(values["warploom"])
    values = language_part(values)
    extras = {name: value for name, value in values.get("warploom", {}).items() if name in TRAINING_ONLY}
    return FAMILIES[kind].read(values).replace(**extras)


def language_part(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part (`text_config`) of a multimodal model's config.json."""
    inner = values.get("text_config")
    if not isinstance(inner, Mapping):
        return values
    above = {name: values[name] for name in ("tie_word_embeddings", "quantization_config") if name in values}
    return {"model_type": values.get("model_type"), **inner, **above}


def family_table() -> Iterator[str]:
    """Lines of the Markdown table of families: fixed fields, fields read from config.json, tensor layout."""
    yield "| `model_type` | class | always | said by the file | tensors |"
    yield "|---|---|---|---|---|"
    common = set(FAMILIES["llama"].words.values())
    for kind, family in FAMILIES.items():
        always = [f"{name}={value}" for name, value in sorted(family.granted.items())]
        fields = {field for words in set(family.words.values()) - common for field in words.split("+")}
        fields |= _fields_of(family) - family.granted.keys()
        laid = [f"norm weights less {family.offset:g}"] if family.offset else []
        laid += [f"rows of {part} in another order" for part in family.orders]
        laid += [f"{part} transposed" for part in family.transposed]
        cells = f"`{kind}`", family.title, *map(", ".join, (always, sorted(fields), laid))
        yield f"| {' | '.join(cells)} |"


def _fields_of(family: Family) -> set[str]:
    """Our fields that a family's custom conversions (`more`) set."""
    config = ModelConfig.preset("llama-tiny", query_growth={"beta": 0.1, "length": 64})
    values, found = {"model_type": ""}, set()
    for name in family.words:
        values |= dict.fromkeys(name.split("|"), 4)
    for word in family.more:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            values |= word.write(config)
    for word in family.more:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            found |= word.read(values).keys()
    return found


# model.safetensors


def weight_map(config: ModelConfig, names: list[str], kind: str | None = None) -> list[WeightMapping]:
    """For each tensor of ours (by name), the published tensors it is assembled from."""
    kind = kind or architecture_of(config)
    if kind == "warploom":
        return [WeightMapping(name, ((name,),)) for name in names]
    return [mapping_of(FAMILIES[kind], config, name) for name in names]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
