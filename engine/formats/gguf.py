"""GGUF writer: weights, architecture and vocabulary in one file, as llama.cpp reads it.

    "GGUF" version counts | metadata: key, type, value … | tensors: name, shape, type, offset … | their data, aligned

Three things differ from our own directories. Names are shorter (`blk.3.attn_q.weight`). Shapes are listed innermost
first. And the architecture `llama` rotates neighboring pairs of a head where we (and published checkpoints) rotate its
two halves, so the rows of its q and k projections are interleaved here; `qwen2`, `qwen3` and `gpt2` keep theirs.

Matrices may be stored in blocks of 8 or 4 bits (gguf_quantize.py): `q8_0`, `q4_0`, or `q4_k_m`, the usual mixture of
4 and 6 bits, which gives values and the down product of some layers the finer ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...tokenizer.base import Tokenizer
from ...tokenizer.sources import atomic_writer
from ..config import ModelConfig
from ..errors import InputError
from ..model import Transformer
from .families import architecture_of
from .gguf_blocks import TYPES
from .gguf_quantize import QUANTIZERS
from .gguf_vocabulary import write_vocabulary

ALIGNMENT = 32
STORED = {  # numbers of the tensor types
    "float32": 0, "float16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8, "q4_k": 12, "q6_k": 14, "bfloat16": 30,
}  # fmt: skip
FILE_TYPES = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bfloat16": 32}
NARROWER = {"q4_k": "q5_0", "q6_k": "q8_0"}  # fallback for rows that are no multiple of 256
ARCHITECTURES = {
    "gpt2": "gpt2", "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip


def save_gguf(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, dtype: str | None = None
) -> str:
    """Write `model` to a GGUF file; return the architecture's name. `dtype`: a key of FILE_TYPES, or None: as it is."""
    config, path = model.config, Path(path)
    dtype = dtype or str(model.embedding.weight.dtype).removeprefix("torch.")
    if dtype not in FILE_TYPES:
        raise InputError(f"dtype {dtype!r} has no GGUF form; choose one of: {', '.join(FILE_TYPES)}")
    kind = _architecture(config)
    facts = {
        "general.architecture": kind, "general.name": path.stem, "general.alignment": ALIGNMENT,
        "general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2,
        **{f"{kind}.{key}": value for key, value in _shape(config, kind).items()},
        **write_vocabulary(tokenizer, config),
    }  # fmt: skip
    tensors = [(name, tensor, _type_of(name, tensor, dtype, config)) for name, tensor in _tensors(model, kind)]
    sizes = [_size(tensor, stored) for _, tensor, stored in tensors]
    offsets = list(accumulate(map(_padded, sizes), initial=0))
    with atomic_writer(path) as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)))
        for key, value in facts.items():
            file.write(_string(key) + _value(value))
        for (name, tensor, stored), offset in zip(tensors, offsets):
            shape = tuple(reversed(tensor.shape))
            file.write(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            file.write(struct.pack("<IQ", STORED[stored], offset))
        _pad(file)
        for _, tensor, stored in tensors:
            file.write(_encode(tensor, stored))
            _pad(file)
    return kind


# The architecture


def _architecture(config: ModelConfig) -> str:
    kind = architecture_of(config)
    if kind not in ARCHITECTURES or (kind == "gpt2" and config.ffn != "gelu"):
        raise InputError("no architecture of GGUF matches this model: it must be a GPT-2, Llama, Qwen or Mixtral")
    if config.n_experts and not config.normalize_experts:
        raise InputError(
            "normalize_experts=False has no GGUF form: readers of GGUF rescale experts' weights to sum to 1"
        )
    if config.sliding_window and config.sliding_window < config.max_seq_len:
        raise InputError(
            f"sliding_window={config.sliding_window} is shorter than max_seq_len={config.max_seq_len}: "
            f"readers of GGUF would attend to everything"
        )
    scaling = (config.rope_scaling or {}).get("rope_type", "default")
    if scaling not in ("default", "linear", "yarn", "llama3"):
        raise InputError(f"rope_scaling {scaling!r} has no GGUF form (linear, yarn and llama3 do)")
    return ARCHITECTURES[kind]


def _shape(c: ModelConfig, kind: str) -> dict[str, Any]:
    shape = {
        "vocab_size": c.vocab_size, "context_length": c.max_seq_len, "embedding_length": c.d_model,
        "block_count": c.n_layers, "feed_forward_length": c.ff_size, "attention.head_count": c.n_heads,
    }  # fmt: skip
    if kind == "gpt2":
        return shape | {"attention.layer_norm_epsilon": float(c.norm_eps)}
    shape |= {
        "attention.head_count_kv": c.kv_heads, "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "attention.key_length": c.head_size, "attention.value_length": c.head_size,
        "rope.dimension_count": c.head_size, "rope.freq_base": float(c.rope_theta),
    }  # fmt: skip
    if c.n_experts:
        shape |= {"expert_count": c.n_experts, "expert_used_count": c.experts_per_token}
        shape |= {"expert_feed_forward_length": c.ff_size} if kind == "qwen3moe" else {}
    scaling = c.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        shape |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "yarn":
        shape |= {"rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"])}
    return shape


# The weights

NAMES = {
    "embedding": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output",
    "attention_norm": "attn_norm", "attention.output": "attn_output", "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm", "ffn_norm": "ffn_norm", "ffn.up": "ffn_up", "ffn.down": "ffn_down",
    "ffn.router": "ffn_gate_inp", "ffn.w_down": "ffn_down_exps",
}  # fmt: skip


def _tensors(model: Transformer, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors under their GGUF names, in float32 or the model's dtype."""
    c = model.config
    for name, parameter in model.named_parameters():
        tensor, prefix = parameter.detach().cpu(), ""
        if name.startswith("blocks."):
            _, layer, name = name.split(".", 2)
            prefix = f"blk.{layer}."
        part, _, leaf = name.rpartition(".")
        if leaf.startswith("w_"):  # a mixture's stacked matrices are bare parameters
            part, leaf = name, "weight"
        for new, piece in _split(part, tensor, c, kind):
            yield f"{prefix}{new}.{leaf}", piece
    if (c.rope_scaling or {}).get("rope_type") == "llama3":
        yield "rope_freqs.weight", slowdown(c)


def _split(part: str, tensor: Tensor, c: ModelConfig, kind: str) -> list[tuple[str, Tensor]]:
    if part == "attention.qkv":
        if kind == "gpt2":
            return [("attn_qkv", tensor)]
        q, k, v = tensor.split([heads * c.head_size for heads in (c.n_heads, c.kv_heads, c.kv_heads)])
        if kind == "llama":
            q, k = _interleave(q, c.n_heads), _interleave(k, c.kv_heads)
        return [("attn_q", q), ("attn_k", k), ("attn_v", v)]
    if part == "ffn.gate_up":
        return list(zip(("ffn_gate", "ffn_up"), tensor.chunk(2)))
    if part == "ffn.w_gate_up":
        return list(zip(("ffn_gate_exps", "ffn_up_exps"), tensor.chunk(2, dim=1)))
    return [(NAMES[part], tensor)]


def _interleave(rows: Tensor, heads: int) -> Tensor:
    """Row permutation from half-split to interleaved RoPE: row i of the first half, row i of the second, …"""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def slowdown(c: ModelConfig) -> Tensor:
    """Llama 3's RoPE scaling as GGUF's `rope_freqs`: by how much each frequency is divided."""
    (cos, sin), (plain_cos, plain_sin) = (
        kernels.rope_tables(c.head_size, 2, c.rope_theta, scaling) for scaling in (c.rope_scaling, None)
    )
    return torch.atan2(plain_sin[1], plain_cos[1]) / torch.atan2(sin[1], cos[1])


# Bytes


def _type_of(name: str, tensor: Tensor, dtype: str, config: ModelConfig) -> str:
    if tensor.ndim == 1 or name.startswith(("position_embd", "rope_freqs")) or "ffn_gate_inp" in name:
        return "float32"
    stored = _mixed(name, config) if dtype == "q4_k_m" else dtype
    columns = tensor.shape[-1]
    if columns % TYPES[STORED[stored]][1]:
        stored = NARROWER.get(stored, stored)
    return "float16" if columns % TYPES[STORED[stored]][1] else stored


def _mixed(name: str, config: ModelConfig) -> str:
    """Type of a matrix in llama.cpp's mixture Q4_K_M: more bits where errors cost most."""
    if name.startswith("output.") or (name.startswith("token_embd") and config.tie_embeddings):
        return "q6_k"
    _, layer, part, *_ = [*name.split("."), "", ""]
    if part not in ("attn_v", "ffn_down", "ffn_down_exps"):
        return "q4_k"
    eighth, index = config.n_layers // 8, int(layer)
    finer = index < eighth or index >= 7 * config.n_layers // 8 or (index - eighth) % 3 == 2
    return "q6_k" if finer else "q4_k"


def _size(tensor: Tensor, stored: str) -> int:
    _, count, size, _ = TYPES[STORED[stored]]
    return tensor.numel() // count * size


def _encode(tensor: Tensor, stored: str) -> bytes:
    if stored not in QUANTIZERS:
        return tensor.to(getattr(torch, stored)).contiguous().view(torch.uint8).numpy().tobytes()
    blocks = tensor.float().reshape(-1, TYPES[STORED[stored]][1]).numpy()
    with np.errstate(all="ignore"):  # division by zero in all-zero blocks
        return b"".join(QUANTIZERS[stored](blocks[at : at + 4096]).tobytes() for at in range(0, len(blocks), 4096))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


KINDS: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    bool: (7, lambda value: struct.pack("<?", value)),
    int: (4, lambda value: struct.pack("<I", value)),
    float: (6, lambda value: struct.pack("<f", value)),
    str: (8, _string),
}


def _value(value: Any) -> bytes:
    """Encode a metadata value with its type; a list with the type of its elements."""
    if isinstance(value, list):
        number, write = KINDS[type(value[0])] if value else KINDS[str]
        number = 5 if number == 4 else number  # kinds of tokens are signed
        return struct.pack("<IIQ", 9, number, len(value)) + b"".join(map(write, value))
    number, write = KINDS[type(value)]
    return struct.pack("<I", number) + write(value)
