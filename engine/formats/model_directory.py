"""Model directories: the unit of exchange.

    config.json  model.safetensors  tokenizer.json  generation_config.json

Anything that trains writes one, anything that serves reads one, and `transformers` opens the same files: names and
layouts are the published ones (`families.py` translates). Writing is atomic: a reader sees the old directory or
the new one. Reading maps the file into memory and copies each tensor once, to where it will live.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from ...tokenizer import load_tokenizer
from ...tokenizer.sources import atomic_directory
from ..config import ModelConfig
from ..device import DTYPES, pick_device
from ..errors import InputError
from ..layers import Linear, MoE
from ..model import Transformer
from ..parallel.tensor_parallel import shard, shard_spec, shard_weights
from .adapters import BASE_SAMPLE, CONFIG, PREFIX, TENSORS, WHOLE, Adapter, AdapterConfig, is_adapter, low_rank_weights
from .families import architecture_of, dtype_name, from_hf_config, kind_of, to_hf_config, weight_map
from .gguf_reader import GGUFFile, GGUFWeights, is_gguf
from .model_source import resolve_model
from .packed_weight import (
    PackedExperts,
    PackedWeight,
    install,
    layouts_from,
    matrix_of,
    packed_in,
    packed_weights,
    share_of,
    to_tensors,
)
from .weights import open_weights, read_json

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "qwen.tiktoken")


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
    """The same of weights under our names that come one after the other: only those of one file are held at a time."""
    directory = Path(directory)
    check_vocabulary(tokenizer, config, "the tokenizer")
    tensors = _published(config, ours, dtype)
    with replacing(directory) as staging:
        if tokenizer is not None:
            tokenizer.save(staging)
        if weights == "bin":
            torch.save(dict(tensors), staging / "pytorch_model.bin")
        else:
            _save_shards(tensors, staging, shard_bytes)
        ids = _text_bounds(tokenizer)
        _write_json(staging / "generation_config.json", ids)
        description = to_hf_config(config) | ids | {"dtype": dtype_name(dtype)}
        _write_json(staging / "config.json", description)
        for file in staging.glob("*.safetensors"):  # their writer makes them private; a model is as open as its config
            shutil.copymode(staging / "config.json", file)
    return directory


def save_packed(model: Transformer, directory: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a model of packed weights (`serving.calibrate`) to a directory that ours alone opens."""
    directory = Path(directory)
    check_vocabulary(tokenizer, model.config, "the tokenizer")
    packed = dict(packed_in(model))
    parts = (part for name, weight in packed.items() for part in to_tensors(name, weight))
    floats = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    layouts = {}
    for name, weight in packed.items():
        first = weight[0] if isinstance(weight, PackedExperts) else weight
        layouts[matrix_of(name.removesuffix(".weight"))] = dataclasses.asdict(first.segments[0].layout)
    with replacing(directory) as staging:
        if tokenizer is not None:
            tokenizer.save(staging)
        _save_shards(chain(floats, parts), staging, SHARD_BYTES)
        ids = _text_bounds(tokenizer)
        _write_json(staging / "generation_config.json", ids)
        quantization = {"quantization_config": {"quant_method": "warploom", "layouts": layouts}}
        _write_json(staging / "config.json", to_hf_config(model.config, "warploom") | ids | quantization)
        for file in staging.glob("*.safetensors"):
            shutil.copymode(staging / "config.json", file)
    return directory


def load_model(
    directory: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tp: ProcessGroup | None = None,
    packed: bool = False,
) -> tuple[Transformer, Any]:
    """The model of a directory or a Hub id, ready to evaluate, and its tokenizer (None where it has none).

    `dtype=None` keeps the stored number format; `packed` leaves quantized weights as they are stored. With `tp`, the
    piece of the model that this process of the group keeps (`sharding.py`); it never holds more than that and one
    tensor.
    """
    directory = resolve_model(directory)
    tokenizer = read_tokenizer(directory)  # a file that cannot be read is told before gigabytes are
    return read_model(directory, device, dtype, tp, packed), tokenizer


def read_model(
    directory: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tp: ProcessGroup | None = None,
    packed: bool = False,
) -> Transformer:
    """The model of a directory alone, whatever its tokenizer."""
    directory = resolve_model(directory)
    config = load_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    weights = read_weights(directory, pick_device(device), DTYPES.get(dtype, dtype), packed, tp is None)
    if tp is not None:
        model = shard(model, tp)
    kept, floats = {}, []
    for name, weight in weights:
        if tp is not None and isinstance(weight, PackedWeight):
            weight = share_of(weight, shard_spec(config, name), tp.rank(), tp.size())
            floats += [name] if isinstance(weight, Tensor) else []
        elif tp is not None:
            ((_, weight),) = shard_weights(config, [(name, cast(Tensor, weight))], tp)
        if isinstance(weight, (PackedWeight, PackedExperts)):
            install(model, name, weight.to(pick_device(device)))
        else:
            kept[name] = weight
    for name in floats:  # what tensor parallelism cuts within a group
        kept[name] = kept[name].to(kept["embedding.weight"])
    model.load_state_dict(kept, assign=True)
    return model.eval()


def stored_as(directory: str | os.PathLike) -> str:
    """Number formats of the weights of a model directory or GGUF file, as it holds them."""
    directory = base_of(resolve_model(directory, weights=False), weights=False)
    if is_gguf(directory):
        return ", ".join(f"{size / 1e6:,.1f} MB of {kind}" for kind, size in GGUFFile(directory).sizes().most_common())
    values = _read_config(directory)
    quantization = _quantization(values)
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
    """Rounding twice adds up: what is packed already is no source for 4 bits, and ours needs no other scheme."""
    if is_gguf(directory):
        if bits == 4:
            GGUFFile(directory).refuse_repacking(scheme)
        return
    quantization = _quantization(_read_config(directory))
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
        file = GGUFFile(directory)
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
    """The tokenizer that a model's name, or a file or directory of a tokenizer alone, stands for."""
    path = resolve_model(name, weights=False)
    if not is_gguf(path):
        return load_tokenizer(path)
    tokenizer = GGUFFile(path).tokenizer()
    if tokenizer is None:
        raise InputError(f"{path} has no tokenizer")
    return tokenizer


def check_vocabulary(tokenizer: Any, config: ModelConfig, name: str) -> None:
    """Every ordinary token needs a row of the model's table; added ones (Gemma's <image_soft_token>) may lie past it.

    A prompt that holds one of those is refused when it comes.
    """
    needed = 1 + max(tokenizer.vocab.values(), default=-1) if tokenizer is not None else 0
    if needed > config.vocab_size:
        raise InputError(f"{name} has {needed} tokens, but the model's vocab_size is {config.vocab_size}")


def load_config(directory: str | os.PathLike) -> ModelConfig:
    """The architecture of a model directory or GGUF file, without its weights; an adapter's is that of its base."""
    directory = base_of(resolve_model(directory, weights=False), weights=False)
    if is_gguf(directory):
        return GGUFFile(directory).config()
    return from_hf_config(_read_config(directory))


def base_of(directory: Path, weights: bool = True) -> Path:
    """Return the directory of the model that an adapter is for; of a model, itself."""
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
    """Which published architecture the tensors of a model directory or GGUF file are named by."""
    directory = base_of(resolve_model(directory, weights=False), weights=False)
    return GGUFFile(directory).config_values()["model_type"] if is_gguf(directory) else kind_of(_read_config(directory))


def open_adapter(directory: str | os.PathLike, base: str | os.PathLike | None = None) -> Adapter:
    """The adapter in a directory, held against its model, or against the one it is to be used with."""
    directory = resolve_model(directory)
    if not is_adapter(directory):
        raise InputError(f"{directory} is no adapter: it has no {CONFIG}")
    judged, base = base is not None, base_of(directory if base is None else Path(base), weights=False)
    adapter = Adapter(directory, load_config(base), kind_in(base))
    if judged and adapter.base_sample:
        adapter.check_base(base, base_sample(base))
    return adapter


def base_sample(base: str | os.PathLike) -> tuple[float, ...]:
    """A few numbers of a model's first matrix in a block, by which an adapter knows its base again."""
    floats = cast("Iterator[tuple[str, Tensor]]", read_weights(base))
    matrices = (weight for name, weight in floats if name.startswith("blocks.") and weight.ndim > 1)
    matrix = next(matrices).float().flatten()
    return tuple(float(f"{number:.4g}") for number in matrix[:: max(1, len(matrix) // 64)][:64])


def _read_config(directory: str | os.PathLike) -> dict[str, Any]:
    directory = resolve_model(directory, weights=False)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: a model is a directory with config.json and its weights")
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{directory} is not a model directory: it has no config.json")
    return read_json(path)


def _quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of packed weights in a config.json; MLX names no method."""
    found = values.get("quantization_config") or values.get("quantization") or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: quantization_config must be an object, not {found!r}")
    return {"quant_method": "mlx", **found} if "bits" in found and "group_size" in found else found


# Reading


def read_weights(
    directory: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
    experts: bool = True,
) -> Iterator[tuple[str, Tensor | PackedWeight | PackedExperts]]:
    """A model directory's weights under our names, one after the other: none is held when the next is read.

    `packed` leaves matrices as they are stored, of experts too if `experts`; those a GPU cannot multiply as they are.
    Of an adapter's directory, its base's with the adapter merged.
    """
    directory = resolve_model(directory)
    base = base_of(directory)
    adapter = open_adapter(directory, base) if is_adapter(directory) else ()
    directory = base
    experts = experts and torch.device(device).type == "cpu"
    if is_gguf(directory):
        file = GGUFFile(directory)
        config, kind = file.config(), file.config_values()["model_type"]
        opened = nullcontext(GGUFWeights(file, config))
    else:
        values = _read_config(directory)
        config, kind = from_hf_config(values), kind_of(values)
        quantization = _quantization(values)
        opened = open_weights(directory, quantization)
        if quantization.get("quant_method") == "warploom":
            if adapter:
                raise InputError(f"{directory} is packed, and an adapter is merged into float weights: serve it apart")
            with opened as weights:
                for name, weight in packed_weights(weights, config, quantization):
                    if isinstance(weight, Tensor) or (packed and (isinstance(weight, PackedWeight) or experts)):
                        yield name, weight.to(device, dtype) if isinstance(weight, Tensor) else weight
                    elif name != "head.weight" or not config.tie_embeddings:
                        yield name, weight.dequantize().to(device, dtype)
            return
    with torch.device("meta"):
        empty = Transformer(config)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    products = {f"{path}.weight" for path, layer in empty.named_modules() if type(layer) is Linear}
    if experts:
        layers = [path for path, layer in empty.named_modules() if type(layer) is MoE]
        products |= {f"{path}.{part}" for path in layers for part in ("w_gate_up", "w_down")}
    with opened as weights:
        for piece in weight_map(config, list(shapes), kind):
            product = "head.weight" if config.tie_embeddings and piece.ours == "embedding.weight" else piece.ours
            if packed and not adapter and (product == "head.weight" or product in products):
                weight = weights.as_packed(piece, shapes[piece.ours])
                if weight is not None:
                    yield product, weight
                    if product == piece.ours:
                        continue
            stored = weights.dtype(piece.theirs[0]) if piece.theirs else torch.float32
            kept = torch.promote_types(dtype or stored, torch.float32) if piece.offset else dtype or stored
            adapted = piece.ours in adapter
            target = torch.empty(shapes[piece.ours], dtype=torch.float32 if adapted else kept, device=device)
            piece.fill(target, weights)
            if adapted:
                target = adapter.merged(piece.ours, target).to(kept)
            if not _finite(target):
                raise InputError(f"{weights.path}: tensor {piece.theirs[0]} holds NaN or infinity")
            yield piece.ours, target
            del target
        heads = ("lm_head.weight", "embed_out.weight") if config.tie_embeddings else ()
        extra = [name for name in weights.unread(config.n_layers) if not name.endswith(heads)]
        if extra:
            raise InputError(f"{weights.path} holds tensor {extra[0]!r}, which config.json does not account for")


def _finite(tensor: Tensor) -> bool:
    """One pass; the sum of finite numbers can only overflow in narrow formats, so it is taken in float32."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


# Writing


def write_adapter(
    adapter: AdapterConfig,
    config: ModelConfig,
    kind: str,
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | os.PathLike,
    tokenizer: Any = None,
) -> Path:
    """Write an adapter that PEFT opens: factors by their published names, embedding and head by ours."""
    directory = Path(directory)
    published: dict[str, Tensor] = {}
    for name, tensor in tensors:
        named = weight_map(config, [name], kind)[0].split(tensor) if name in WHOLE else ((name, tensor),)
        published |= {PREFIX + theirs: part.to("cpu", torch.float32).contiguous() for theirs, part in named}
    with replacing(directory) as staging:
        if tokenizer is not None:
            tokenizer.save(staging)
        save_file(published, staging / TENSORS, metadata={"format": "pt"})
        _write_json(staging / "generation_config.json", _text_bounds(tokenizer))
        _write_json(staging / CONFIG, adapter.to_peft(_transposed(config, kind)))
        if adapter.sample:
            (staging / BASE_SAMPLE).write_text(json.dumps(adapter.sample))
        shutil.copymode(staging / CONFIG, staging / TENSORS)
    return directory


def copy_adapter(source: Path, directory: Path) -> Adapter:
    """Write the adapter of a directory, and nothing else that lies there, to another."""
    adapter, tokenizer = open_adapter(source), read_tokenizer(source)
    with replacing(directory) as staging:
        if tokenizer is not None:
            tokenizer.save(staging)
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
    """Files are numbered as they fill; only at the end is it known of how many."""
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
def replacing(directory: Path) -> Iterator[Path]:
    """A staging directory whose files take their place in `directory` when the block ends well, or vanish.

    A new directory appears whole, by one rename. In an existing one each file is renamed over its predecessor,
    config.json last, and weights of the former model or adapter are removed, so that two never mix.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; a model is written to a directory")
    with atomic_directory(directory, _rename_over) as staging:
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
    """Which tokens begin and end a text; where nothing marks a beginning, the end of the text before does."""
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
