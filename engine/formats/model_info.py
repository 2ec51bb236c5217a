"""Inspection of a model directory or GGUF file without its weights: configuration, tokenizer, storage format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tokenizer import load_tokenizer
from ..config import ModelConfig
from ..errors import InputError
from .adapters import AdapterConfig, is_adapter
from .families import from_hf_config, kind_of
from .gguf_reader import is_gguf, open_gguf
from .model_source import resolve_model
from .packed_files import layouts_from
from .weights import open_weights, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "qwen.tiktoken")


def stored_as(directory: str | os.PathLike) -> str:
    """Describe the number formats in which a model's weights are stored."""
    directory = base_of(resolve_model(directory, weights=False), weights=False)
    if is_gguf(directory):
        return ", ".join(f"{size / 1e6:,.1f} MB of {kind}" for kind, size in open_gguf(directory).sizes().most_common())
    values = read_config(directory)
    quantization = quantization_of(values)
    method = quantization.get("quant_method")
    if method is None:
        return str(values.get("dtype") or values.get("torch_dtype") or "float32")
    if method != "warploom":
        bits = quantization.get("bits")
        return f"{method} of {bits} bits" if bits else str(method)
    kinds: dict[str, list[str]] = {}
    for kind, layout in layouts_from(quantization).items():
        kinds.setdefault(str(layout), []).append(kind)
    return "; ".join(f"{layout}: {', '.join(names)}" for layout, names in kinds.items())


def refuse_repacking(directory: str | os.PathLike, scheme: Any, bits: int) -> None:
    """Refuse to requantize packed weights to 4 bits (rounding errors add up), and our own packed ones at all."""
    if is_gguf(directory):
        if bits == 4:
            open_gguf(directory).refuse_repacking(scheme)
        return
    quantization = quantization_of(read_config(directory))
    method = quantization.get("quant_method")
    if method == "warploom":
        held = max(layout.bits for kind, layout in layouts_from(quantization).items() if kind != "head")
        raise InputError(f"quantize={scheme!r} is for float weights, and {directory} has {held} bits: leave it out")
    if method is not None and bits == 4:
        raise InputError(f"quantize={scheme!r} is for float weights, and {directory} is packed by {method!r}")


def read_tokenizer(directory: str | os.PathLike) -> Any:
    """The tokenizer of a model directory, or None where there is no file of one."""
    directory = resolve_model(directory, weights=False)
    if is_gguf(directory):
        file = open_gguf(directory)
        tokenizer = file.tokenizer()
        check_vocabulary(tokenizer, file.config(), str(directory))
        return tokenizer
    config = load_config(directory)
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return read_tokenizer(base_of(directory)) if is_adapter(directory) else None
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config, str(directory / "tokenizer.json"))
    return tokenizer


def open_tokenizer(name: str | os.PathLike) -> Any:
    """Load the tokenizer of a model name, a tokenizer file or a directory that holds just a tokenizer."""
    path = resolve_model(name, weights=False)
    if not is_gguf(path):
        return load_tokenizer(path)
    tokenizer = open_gguf(path).tokenizer()
    if tokenizer is None:
        raise InputError(f"{path} has no tokenizer")
    return tokenizer


def check_vocabulary(tokenizer: Any, config: ModelConfig, name: str) -> None:
    """Check that every ordinary token has a row of the embedding; added ones (<image_soft_token>) may lie past it.

    A prompt that holds one of those is refused when it comes.
    """
    needed = 1 + max(tokenizer.vocab.values(), default=-1) if tokenizer is not None else 0
    if needed > config.vocab_size:
        raise InputError(f"{name} has {needed} tokens, but the model's vocab_size is {config.vocab_size}")


def load_config(directory: str | os.PathLike) -> ModelConfig:
    """The architecture of a model directory or GGUF file, without its weights; an adapter's is that of its base."""
    directory = base_of(resolve_model(directory, weights=False), weights=False)
    if is_gguf(directory):
        return open_gguf(directory).config()
    return from_hf_config(read_config(directory))


def check_model(name: str | os.PathLike) -> None:
    """Refuse early, by config.json and the names of weight files, what no model can be loaded from."""
    load_config(name)
    found = resolve_model(name, weights=False)
    if Path(name).exists() and not is_gguf(base := base_of(found)):  # else its files are still to be fetched
        with open_weights(base, quantization_of(read_config(base))):
            pass


def base_of(directory: Path, weights: bool = True) -> Path:
    """Directory of the base model of an adapter; a model's own directory."""
    if not is_adapter(directory):
        return directory
    base = AdapterConfig.read(directory).base
    near = directory / base  # PEFT means a path from where one stands; files that travel together mean this
    try:
        found = near if near.is_dir() else resolve_model(base, weights)
    except InputError as error:
        raise InputError(f"{directory} is an adapter, and its model is not here: {error}") from None
    if is_adapter(found):
        raise InputError(f"{directory} is an adapter of {found}, which is an adapter itself: merge that one first")
    return found


def kind_in(directory: str | os.PathLike) -> str:
    """Model family whose tensor names a model directory or GGUF file uses."""
    directory = base_of(resolve_model(directory, weights=False), weights=False)
    return open_gguf(directory).config_values()["model_type"] if is_gguf(directory) else kind_of(read_config(directory))


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    directory = resolve_model(directory, weights=False)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: a model is a directory with config.json and its weights")
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{directory} is not a model directory: it has no config.json")
    return read_json(path)


def quantization_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings of a config.json; MLX's have no `quant_method`."""
    found = values.get("quantization_config") or values.get("quantization") or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: quantization_config must be an object, not {found!r}")
    return {"quant_method": "mlx", **found} if "bits" in found and "group_size" in found else found
