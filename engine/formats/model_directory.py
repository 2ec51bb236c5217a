"""Model directories (config.json, model.safetensors, tokenizer.json): loading.

    config.json  model.safetensors  tokenizer.json  generation_config.json

Anything that trains writes one, anything that serves reads one, and `transformers` opens the same files: names and
layouts are the published ones (`families.py` translates). Reading maps the file into memory and copies each tensor
once, to where it will live; `model_writer.py` writes, `model_info.py` tells what a directory holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..config import ModelConfig
from ..device import DTYPES, pick_device
from ..errors import InputError
from ..layers import Linear, MoE
from ..model import Transformer
from ..parallel.tensor_parallel import shard, shard_spec, shard_weights
from .adapters import CONFIG, Adapter, is_adapter
from .families import from_hf_config, kind_of, weight_map
from .gguf_reader import GGUFWeights, is_gguf, open_gguf
from .model_info import base_of, kind_in, load_config, quantization_of, read_config, read_tokenizer
from .model_source import resolve_model
from .packed_files import packed_weights
from .packed_weight import PackedExperts, PackedWeight, dequantize_lone_experts, install, share_of
from .weights import Weights, open_weights

Read = Iterator[tuple[str, Tensor | PackedWeight | PackedExperts]]


def load_model(
    directory: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tp: ProcessGroup | None = None,
    packed: bool = False,
) -> tuple[Transformer, Any]:
    """Load a model and its tokenizer (None if it has none) from a directory, GGUF file or Hub id.

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
    """Load the model without its tokenizer."""
    directory = resolve_model(directory)
    config = load_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    where = pick_device(device)
    weights = read_weights(directory, where, DTYPES.get(dtype, dtype), packed)
    if tp is not None:
        model = shard(model, tp)
    kept, floats = {}, []
    for name, weight in weights:
        if tp is not None and isinstance(weight, (PackedWeight, PackedExperts)):
            weight = share_of(weight, shard_spec(config, name), tp.rank(), tp.size())
            floats += [name] if isinstance(weight, Tensor) else []
        elif tp is not None:
            ((_, weight),) = shard_weights(config, [(name, cast(Tensor, weight))], tp)
        if isinstance(weight, (PackedWeight, PackedExperts)):
            install(model, name, weight.to(where))
        else:
            kept[name] = weight
    for name in floats:  # weights whose groups tensor parallelism would split
        kept[name] = kept[name].to(kept["embedding.weight"])
    model.load_state_dict(kept, assign=True)
    if where.type != "cpu":
        dequantize_lone_experts(model)
    return model.eval()


def open_adapter(directory: str | os.PathLike, base: str | os.PathLike | None = None) -> Adapter:
    """Open a LoRA adapter, checked against its own base model or against `base`."""
    directory = resolve_model(directory)
    if not is_adapter(directory):
        raise InputError(f"{directory} is no adapter: it has no {CONFIG}")
    judged, base = base is not None, base_of(directory if base is None else Path(base), weights=False)
    adapter = Adapter(directory, load_config(base), kind_in(base))
    if judged and adapter.base_sample:
        adapter.check_base(base, base_sample(base))
    return adapter


def base_sample(base: str | os.PathLike) -> tuple[float, ...]:
    """Sample of a model's first block matrix, by which an adapter recognizes its base."""
    floats = cast("Iterator[tuple[str, Tensor]]", read_weights(base))
    matrices = (weight for name, weight in floats if name.startswith("blocks.") and weight.ndim > 1)
    matrix = next(matrices).float().flatten()
    return tuple(float(f"{number:.4g}") for number in matrix[:: max(1, len(matrix) // 64)][:64])


def read_weights(
    directory: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Read:
    """Yield a model directory's weights under our names, one at a time.

    `packed` leaves matrices as they are stored, those of experts on a GPU if all have one layout.
    Of an adapter's directory, its base's with the adapter merged.
    """
    directory = resolve_model(directory)
    base = base_of(directory)
    adapter = open_adapter(directory, base) if is_adapter(directory) else None
    if is_gguf(base):
        file = open_gguf(base)
        config, kind = file.config(), file.config_values()["model_type"]
        opened = nullcontext(GGUFWeights(file, config))
    else:
        values = read_config(base)
        config, kind, quantization = from_hf_config(values), kind_of(values), quantization_of(values)
        opened = open_weights(base, quantization)
        if quantization.get("quant_method") == "warploom":
            if adapter is not None:
                raise InputError(f"{base} is packed, and an adapter is merged into float weights: serve it apart")
            with opened as weights:
                yield from _own_packed(weights, config, quantization, device, dtype, packed)
            return
    with opened as weights:
        yield from _published(weights, config, kind, adapter, device, dtype, packed)


def _own_packed(
    weights: Weights, config: ModelConfig, quantization: Any, device: Any, dtype: Any, packed: bool
) -> Read:
    """Yield the weights of a directory that `save_packed` wrote."""
    for name, weight in packed_weights(weights, config, quantization):
        if isinstance(weight, Tensor):
            yield name, weight.to(device, dtype)
        elif packed:
            yield name, weight
        elif name != "head.weight" or not config.tie_embeddings:
            yield name, weight.dequantize().to(device, dtype)


def _published(
    weights: Any, config: ModelConfig, kind: str, adapter: Adapter | None, device: Any, dtype: Any, packed: bool
) -> Read:
    """Yield the weights of a published model under our names."""
    with torch.device("meta"):
        empty = Transformer(config)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    products = _products(empty) if packed and adapter is None else set()
    mixed = torch.device(device).type == "cpu"
    weights.keeps_fp8 = not mixed
    for piece in weight_map(config, list(shapes), kind):
        product = "head.weight" if config.tie_embeddings and piece.ours == "embedding.weight" else piece.ours
        weight = weights.as_packed(piece, shapes[piece.ours]) if product in products else None
        if weight is not None and (mixed or not isinstance(weight, PackedExperts) or weight.alike):
            yield product, weight
            if product == piece.ours:
                continue
        yield piece.ours, _floats(weights, piece, shapes[piece.ours], adapter, device, dtype)
    heads = ("lm_head.weight", "embed_out.weight") if config.tie_embeddings else ()
    extra = [name for name in weights.unread(config.n_layers) if not name.endswith(heads)]
    if extra:
        raise InputError(f"{weights.path} holds tensor {extra[0]!r}, which config.json does not account for")


def _products(model: Transformer) -> set[str]:
    """Names of weights that may be packed: linear layers, experts, the head."""
    found = {"head.weight"}
    for path, layer in model.named_modules():
        if type(layer) is Linear:
            found.add(f"{path}.weight")
        elif type(layer) is MoE:
            found |= {f"{path}.w_gate_up", f"{path}.w_down"}
    return found


def _floats(weights: Any, piece: Any, shape: torch.Size, adapter: Adapter | None, device: Any, dtype: Any) -> Tensor:
    """A float weight in the dtype asked for or stored, an adapter merged into it."""
    stored = weights.dtype(piece.theirs[0]) if piece.theirs else torch.float32
    kept = torch.promote_types(dtype or stored, torch.float32) if piece.offset else dtype or stored
    merged = adapter is not None and piece.ours in adapter
    target = torch.empty(shape, dtype=torch.float32 if merged else kept, device=device)
    piece.fill(target, weights)
    if adapter is not None and merged:
        target = adapter.merged(piece.ours, target).to(kept)
    if not _finite(target):
        raise InputError(f"{weights.path}: tensor {piece.theirs[0]} holds NaN or infinity")
    return target


def _finite(tensor: Tensor) -> bool:
    """Check for NaN and infinity in one pass by the sum; in float32, as narrow formats could overflow."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
