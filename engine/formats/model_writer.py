"""Writer of model directories: sharded safetensors under published names, config.json, tokenizer; PEFT adapters.

Writing is atomic: a reader sees the old directory or the new one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...tokenizer.sources import atomic_directory
from ..config import ModelConfig
from ..errors import InputError
from ..model import Transformer
from .adapters import BASE_SAMPLE, CONFIG, PREFIX, TENSORS, WHOLE, Adapter, AdapterConfig, low_rank_weights
from .families import architecture_of, dtype_name, to_hf_config, weight_map
from .model_directory import open_adapter
from .model_info import check_vocabulary, read_tokenizer
from .packed_files import to_tensors
from .packed_weight import PackedExperts, matrix_of, packed_in

SHARD_BYTES = 5 * 10**9


def save_model(
    model: Transformer,
    directory: str | os.PathLike,
    tokenizer: Any = None,
    *,
    weights: Literal["safetensors", "bin"] = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model directory that `load_model` and `transformers.AutoModelForCausalLM` open."""
    ours = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    dtype = model.embedding.weight.dtype
    return write_model(model.config, ours, dtype, directory, tokenizer, weights=weights, shard_bytes=shard_bytes)


def write_model(
    config: ModelConfig,
    ours: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    directory: str | os.PathLike,
    tokenizer: Any = None,
    *,
    weights: Literal["safetensors", "bin"] = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write weights streamed under our names as a model directory; one shard at a time is held in memory."""
    directory = Path(directory)
    check_vocabulary(tokenizer, config, "the tokenizer")
    tensors = _published(config, ours, dtype)
    with replacing(directory, tokenizer) as staging:
        if weights == "bin":
            torch.save(dict(tensors), staging / "pytorch_model.bin")
        else:
            _save_shards(tensors, staging, shard_bytes)
        _describe(staging, to_hf_config(config), tokenizer, {"dtype": dtype_name(dtype)})
    return directory


def save_packed(model: Transformer, directory: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a quantized model (`serving.calibrate`) to a directory that only this library opens."""
    directory = Path(directory)
    check_vocabulary(tokenizer, model.config, "the tokenizer")
    packed = dict(packed_in(model))
    parts = (part for name, weight in packed.items() for part in to_tensors(name, weight))
    floats = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    layouts = {}
    for name, weight in packed.items():
        first = weight[0] if isinstance(weight, PackedExperts) else weight
        layouts[matrix_of(name.removesuffix(".weight"))] = dataclasses.asdict(first.segments[0].layout)
    with replacing(directory, tokenizer) as staging:
        _save_shards(chain(floats, parts), staging, SHARD_BYTES)
        quantization = {"quantization_config": {"quant_method": "warploom", "layouts": layouts}}
        _describe(staging, to_hf_config(model.config, "warploom"), tokenizer, quantization)
    return directory


def _describe(staging: Path, config: Mapping[str, Any], tokenizer: Any, more: Mapping[str, Any]) -> None:
    """Write config.json and generation_config.json beside weights that are already there."""
    bounds = _text_bounds(tokenizer)
    _write_json(staging / "generation_config.json", bounds)
    _write_json(staging / "config.json", {**config, **bounds, **more})
    for file in staging.glob("*.safetensors"):  # their writer makes them private; a model is as open as its config
        shutil.copymode(staging / "config.json", file)


def write_adapter(
    adapter: AdapterConfig,
    config: ModelConfig,
    kind: str,
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | os.PathLike,
    tokenizer: Any = None,
) -> Path:
    """Write a LoRA adapter that PEFT opens: factors by their published names, embedding and head by ours."""
    directory = Path(directory)
    published: dict[str, Tensor] = {}
    for name, tensor in tensors:
        named = weight_map(config, [name], kind)[0].split(tensor) if name in WHOLE else ((name, tensor),)
        published |= {PREFIX + theirs: part.to("cpu", torch.float32).contiguous() for theirs, part in named}
    with replacing(directory, tokenizer) as staging:
        save_file(published, staging / TENSORS, metadata={"format": "pt"})
        _write_json(staging / "generation_config.json", _text_bounds(tokenizer))
        _write_json(staging / CONFIG, adapter.to_peft(_transposed(config, kind)))
        if adapter.sample:
            (staging / BASE_SAMPLE).write_text(json.dumps(adapter.sample))
        shutil.copymode(staging / CONFIG, staging / TENSORS)
    return directory


def copy_adapter(source: Path, directory: Path) -> Adapter:
    """Copy the files of an adapter, and nothing else in its directory."""
    adapter, tokenizer = open_adapter(source), read_tokenizer(source)
    with replacing(directory, tokenizer) as staging:
        for name in (TENSORS, CONFIG, BASE_SAMPLE):
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
    return adapter


def _transposed(config: ModelConfig, kind: str) -> bool:
    names = [weight.weight for weight in low_rank_weights(config, kind)]
    return any(piece.transposed for piece in weight_map(config, names, kind))


def _published(
    config: ModelConfig, ours: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    kind = architecture_of(config)
    for name, tensor in ours:
        (piece,) = weight_map(config, [name], kind)
        yield from ((theirs, part.to("cpu", dtype)) for theirs, part in piece.split(tensor))


def _save_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> None:
    """Write tensors into shards of at most `shard_bytes`; names ("… of N") are given at the end, when N is known."""
    sizes: list[int] = []
    places: dict[str, int] = {}
    for part in _shards(tensors, shard_bytes):
        places |= dict.fromkeys(part, len(sizes))
        save_file(part, directory / f"{len(sizes)}.safetensors", metadata={"format": "pt"})
        sizes.append(_bytes(part))
    count = len(sizes)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        os.rename(directory / f"{number}.safetensors", directory / name)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {key: names[i] for key, i in places.items()}}
        _write_json(directory / "model.safetensors.index.json", index)


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and _bytes(shard) + tensor.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _bytes(shard: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


@contextmanager
def replacing(directory: Path, tokenizer: Any = None) -> Iterator[Path]:
    """Staging directory, with the tokenizer in it, whose files replace those in `directory` when the block succeeds and
    are removed when it fails.

    A new directory appears whole, by one rename. In an existing one each file is renamed over its predecessor,
    config.json last, and weights of the former model or adapter are removed, so that two never mix.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; a model is written to a directory")
    with atomic_directory(directory, _rename_over) as staging:
        if tokenizer is not None:
            tokenizer.save(staging)
        yield staging


def _rename_over(staging: Path, directory: Path) -> None:
    written = sorted(os.listdir(staging), key=lambda name: name == "config.json")
    for name in written:
        os.replace(staging / name, directory / name)
    for pattern in ("model*.safetensors*", "pytorch_model.bin", "adapter_*", "config.json"):
        for stale in directory.glob(pattern):
            if stale.name not in written:
                stale.unlink()


def _text_bounds(tokenizer: Any) -> dict[str, int | list[int] | None]:
    """bos and eos ids (all stop ids) for the configs; without a bos token, the eos of the previous text stands in."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    ends = [*([] if end is None else [end]), *sorted(tokenizer.special.stops - {end})]
    return {
        "bos_token_id": end if begin is None else begin,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
