"""GGUF reader: configuration, tokenizer and weights of one file, by the interface of a model directory.

The file is mapped; a tensor is dequantized when it is asked for (gguf_blocks.py), to float32, or to the 16 bits in
which all matrices are stored. Metadata become the words of a config.json, and tensors answer to its names, so that
families.py does the rest. Counts and sizes are held against the length of the file and the shapes of tensors before
anything is allocated.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tokenizer import BPETokenizer
from ..config import ModelConfig
from ..errors import InputError
from .families import from_hf_config
from .gguf import slowdown
from .gguf_blocks import TYPES
from .gguf_packed import PACKED, pack_blocks
from .gguf_vocabulary import read_vocabulary
from .packed_weight import Segment
from .weights import Weights

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
WORDS = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}  # fmt: skip
GPT2_WORDS = {
    "vocab_size": "vocab_size", "context_length": "n_positions", "embedding_length": "n_embd",
    "block_count": "n_layer", "feed_forward_length": "n_inner", "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
PARTS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
EXPERTS = {  # of the families that have them: their words for numbers, and where experts and router are
    "qwen3_moe": (
        {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
         "expert_feed_forward_length": "moe_intermediate_size"},
        {"ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.*.gate_proj", "ffn_up_exps": "mlp.experts.*.up_proj",
         "ffn_down_exps": "mlp.experts.*.down_proj"},
    ),
    "mixtral": (
        {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        {"ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
         "ffn_up_exps": "block_sparse_moe.experts.*.w3", "ffn_down_exps": "block_sparse_moe.experts.*.w2"},
    ),
}  # fmt: skip
GPT2_PARTS = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # of GPT-2, as it is published
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "gpt2": "gpt2"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_gguf(path: Any) -> bool:
    return isinstance(path, (str, os.PathLike)) and Path(path).suffix == ".gguf" and Path(path).is_file()


@dataclass(frozen=True)
class Entry:
    """Offset, type and shape (in PyTorch's order) of a tensor in the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    size: int


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Parse a file's header; the last one is cached, for opening a model asks three times."""
    facts = os.stat(path)
    return _parsed(Path(path), facts.st_mtime_ns, facts.st_size, facts.st_ino)


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, *version: int) -> GGUFFile:
    return GGUFFile(path)


class GGUFFile:
    """Metadata and tensors of a GGUF file."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self.at = 0
        try:
            self._read_head()
        except (struct.error, UnicodeDecodeError):
            raise InputError(f"{self.path} is damaged or cut short at byte {self.at}") from None

    def _read_head(self) -> None:
        if self.data[:4] != b"GGUF":
            raise InputError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")
        self.at = 4
        version, tensors, facts = self._unpack("<IQQ")
        if version not in (2, 3):
            raise InputError(f"{self.path} is of GGUF version {version}; 2 and 3 are read")
        self.metadata: dict[str, Any] = {}
        for _ in range(facts):
            key = self._string()
            self.metadata[key] = self._value(*self._unpack("<I"))
        heads = [(self._string(), self._shape(), *self._unpack("<IQ")) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise InputError(f"{self.path}: general.alignment is {alignment!r}; it must be at least 1")
        start = -(-self.at // alignment) * alignment
        self.tensors = {name: self._entry(name, shape, kind, start + at) for name, shape, kind, at in heads}

    def _unpack(self, form: str) -> tuple:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        if length > len(self.data) - self.at:
            raise struct.error
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            if kind not in SCALARS:
                raise InputError(f"{self.path} holds a value of unknown type {kind} at byte {self.at}")
            return self._unpack("<" + SCALARS[kind])[0]
        member, count = self._unpack("<IQ")
        if count > len(self.data) - self.at:
            raise struct.error
        if member in SCALARS:
            return list(self._unpack(f"<{count}{SCALARS[member]}"))
        if member != STRING:
            raise InputError(f"{self.path} holds a list of type {member}, which is not read")
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """Read an array of strings in one loop: by `_string` it would be half of the time of opening a model."""
        found, at, size, length_at = [], self.at, len(self.data), struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = length_at(self.data, at)
                at += 8
                if length > size - at:
                    raise struct.error
                found.append(self.data[at : at + length].decode())
                at += length
        finally:
            self.at = at
        return found

    def _shape(self) -> tuple[int, ...]:
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= 4:
            raise InputError(f"{self.path} holds a tensor of {dimensions} dimensions; 1 to 4 are possible")
        return tuple(reversed(self._unpack(f"<{dimensions}Q")))

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Entry:
        if kind not in TYPES:
            known = ", ".join(name for name, *_ in TYPES.values())
            raise InputError(f"{self.path}: tensor {name} is of type {kind}, which is not read; {known} are")
        stored, count, size, _ = TYPES[kind]
        if shape[-1] % count or not all(shape):
            raise InputError(
                f"{self.path}: tensor {name} has shape {shape}, {stored} needs rows of a multiple of {count}"
            )
        whole = math.prod(shape) // count * size
        if start + whole > len(self.data):
            raise InputError(
                f"{self.path} is cut short: tensor {name} ends at byte {start + whole} of {len(self.data)}"
            )
        return Entry(shape, kind, start, whole)

    def dtype(self) -> torch.dtype:
        """The matrices' dtype if all have the same 16-bit one; else float32, which holds every number exactly."""
        types = {entry.type for entry in self.tensors.values() if len(entry.shape) > 1}
        return {(1,): torch.float16, (30,): torch.bfloat16}.get(tuple(types), torch.float32)

    def sizes(self) -> Counter[str]:
        """Bytes of tensors by quantization type."""
        sizes: Counter[str] = Counter()
        for entry in self.tensors.values():
            sizes[TYPES[entry.type][0]] += entry.size
        return sizes

    def refuse_repacking(self, scheme: Any) -> None:
        """Refuse to requantize packed weights to 4 bits: rounding errors would add up."""
        sizes = self.sizes()
        if packed := sizes.keys() - {"F32", "F16", "BF16"}:
            held = max(packed, key=sizes.__getitem__)
            raise InputError(
                f"quantize={scheme!r} is for float weights, and {self.path} is {held} already: leave it out"
            )

    def expert(self, name: str, number: int) -> Entry:
        """Entry of one expert inside a stacked tensor."""
        entry = self.tensors[name]
        size = entry.size // entry.shape[0]
        return Entry(entry.shape[1:], entry.type, entry.start + number * size, size)

    def read(self, name: str, entry: Entry | None = None) -> Tensor:
        """Dequantize a tensor, or one expert of it by its entry, to float32."""
        entry = entry or self.tensors[name]
        _, _, size, values = TYPES[entry.type]
        blocks = np.frombuffer(self.data, np.uint8, entry.size, entry.start).reshape(-1, size)
        numbers = np.empty(math.prod(entry.shape), np.float32)
        step = max(1, (1 << 16) // size)  # stays in cache, and needs no second copy of the tensor
        per = numbers.size // len(blocks)
        for at in range(0, len(blocks), step):
            with np.errstate(all="ignore"):  # a NaN is refused later, by name
                numbers[at * per : (at + step) * per] = values(blocks[at : at + step]).reshape(-1)
        return torch.from_numpy(numbers).view(entry.shape)

    def read_packed(self, name: str, entry: Entry | None = None) -> Segment | None:
        """A matrix in its packed form; None where it is not packed, or in a format that is dequantized."""
        entry = entry or self.tensors[name]
        if entry.type not in PACKED or len(entry.shape) != 2:
            return None
        blocks = np.frombuffer(self.data, np.uint8, entry.size, entry.start).reshape(-1, TYPES[entry.type][2])
        with np.errstate(all="ignore"):
            segment = pack_blocks(entry.type, blocks, entry.shape[0])
        parts = () if segment is None else (segment.scales, segment.minima)
        if not all(part is None or part.isfinite().all() for part in parts):
            raise InputError(f"{self.path}: tensor {name} holds NaN or infinity")
        return segment

    # Configuration

    def config_values(self) -> dict[str, Any]:
        """Metadata converted to the keys of a config.json."""
        kind = self.metadata.get("general.architecture")
        if kind not in ARCHITECTURES:
            raise InputError(f"{self.path}: architecture {kind!r} is not read; {', '.join(ARCHITECTURES)} are")
        family = ARCHITECTURES[kind]
        if self.metadata.get(f"{kind}.expert_count"):
            family = "mixtral" if kind == "llama" else family
            if family not in EXPERTS:
                raise InputError(f"{self.path}: experts of {kind!r} are not read; those of llama and qwen3moe are")
        if f"{kind}.vocab_size" not in self.metadata and "token_embd.weight" in self.tensors:
            self.metadata[f"{kind}.vocab_size"] = self.tensors["token_embd.weight"].shape[0]
        values: dict[str, Any] = {"model_type": family, "tie_word_embeddings": "output.weight" not in self.tensors}
        more = EXPERTS[family][0] if family in EXPERTS else {}
        if family == "qwen3_moe":
            values["norm_topk_prob"] = True  # llama.cpp divides by their sum, and has no word for it
        for key, word in ((GPT2_WORDS if kind == "gpt2" else WORDS) | more).items():
            value = self.metadata.get(f"{kind}.{key}")
            if value is None:
                continue
            low, types = (0, (int, float)) if "epsilon" in key or "freq_base" in key else (1, (int,))
            if type(value) not in types or not low <= value < math.inf:
                raise InputError(f"{self.path}: {kind}.{key} is {value if type(value) is not list else 'a list'}")
            values[word] = value
        size = values.get("head_dim") or values.get("hidden_size", 0) // values.get("num_attention_heads", 1)
        turned = self.metadata.get(f"{kind}.rope.dimension_count", size)
        if kind != "gpt2" and turned != size:
            raise InputError(
                f"{self.path}: {kind}.rope.dimension_count is {turned}; only whole heads, {size}, are read"
            )
        if kind in ("llama", "qwen3") and "blk.0.attn_q.bias" in self.tensors:
            values["attention_bias"] = True
        scaling = self._scaling(kind, values)
        if scaling:
            values["rope_scaling"] = scaling
        return values

    def _scaling(self, kind: str, values: dict[str, Any]) -> dict[str, Any] | None:
        said = {key: self.metadata.get(f"{kind}.rope.scaling.{key}") for key in ("type", "factor")}
        if said["type"] in ("linear", "yarn"):
            more = self.metadata.get(f"{kind}.rope.scaling.original_context_length")
            found = {"rope_type": said["type"], "factor": said["factor"]}
            return found | ({"original_max_position_embeddings": more} if more and said["type"] == "yarn" else {})
        if said["type"] not in (None, "none"):
            raise InputError(f"{self.path}: {kind}.rope.scaling.type {said['type']!r} is not read; linear and yarn are")
        if "rope_freqs.weight" not in self.tensors:
            return None
        return {"rope_type": "llama3", "factor": float(self.read("rope_freqs.weight").max()), **LLAMA3}

    def config(self) -> ModelConfig:
        """The architecture as a `ModelConfig`, checked against the tensors that exist."""
        values = self.config_values()
        kind, family = self.metadata["general.architecture"], values["model_type"]
        layers = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        said = values.get("n_layer" if kind == "gpt2" else "num_hidden_layers")
        if said != len(layers):
            raise InputError(f"{self.path}: {kind}.block_count is {said}, but there are tensors of {len(layers)}")
        try:
            config = from_hf_config(values)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None
        heads = config.n_heads * config.head_size
        self._check("token_embd", (config.vocab_size, config.d_model), "vocab_size, embedding_length")
        if family in EXPERTS:
            down, apart = (config.d_model, config.ff_size), "blk.0.ffn_down.0.weight" in self.tensors
            name, shape = ("blk.0.ffn_down.0", down) if apart else ("blk.0.ffn_down_exps", (config.n_experts, *down))
            self._check(name, shape, "expert_count, expert_feed_forward_length")
        else:
            self._check("blk.0.ffn_down", (config.d_model, config.ff_size), "feed_forward_length")
        self._check("blk.0.attn_output", (config.d_model, heads), "attention.head_count, attention.key_length")
        if kind == "gpt2":
            self._check("position_embd", (config.max_seq_len, config.d_model), "context_length")
        else:
            self._check("blk.0.attn_k", (config.kv_heads * config.head_size, config.d_model), "attention.head_count_kv")
        if (config.rope_scaling or {}).get("rope_type") == "llama3":
            written = self.read("rope_freqs.weight")
            computed = slowdown(config)
            if written.shape != computed.shape or not torch.allclose(written, computed, rtol=1e-3):
                raise InputError(f"{self.path}: rope_freqs.weight is not the scaling of Llama 3, the only one read")
        return config

    def _check(self, name: str, shape: tuple[int, ...], fields: str) -> None:
        entry = self.tensors.get(f"{name}.weight")
        if entry is None:
            raise InputError(f"{self.path} has no tensor {name}.weight")
        if entry.shape != shape:
            raise InputError(f"{self.path}: tensor {name}.weight has shape {entry.shape}, by {fields} it is {shape}")

    def tokenizer(self) -> BPETokenizer | None:
        """The tokenizer, or None where the file has none."""
        return read_vocabulary(self.metadata, self.path)


class GGUFWeights(Weights):
    """Tensors of a GGUF file under their safetensors names."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config, self.architecture = file, config, file.metadata["general.architecture"]
        self.family = file.config_values()["model_type"]
        self.stored = {self._published(name): name for name in file.tensors if name != "rope_freqs.weight"}
        self.experts: dict[str, Entry] = {}
        for stack in [name for name in self.stored if "*" in name]:
            stored = self.stored.pop(stack)
            for number in range(file.tensors[stored].shape[0]):
                name = stack.replace("*", str(number))
                self.stored[name], self.experts[name] = stored, file.expert(stored, number)
        super().__init__(dict.fromkeys(self.stored, self), file.path)

    def dtype(self, name: str) -> torch.dtype:
        return self.file.dtype()

    def get_tensor(self, name: str) -> Tensor:
        stored = self.stored[name]
        tensor = self.file.read(stored, self.experts.get(name))
        part, leaf = stored.split(".")[-2:]
        if self.architecture == "gpt2" and leaf == "weight" and part in TRANSPOSED:
            return tensor.mT
        order = self._order(part, len(tensor))
        return tensor if order is None else tensor[order]

    def packed(self, name: str) -> Segment | None:
        """A matrix in its packed form, if it has one and needs no permutation within rows."""
        stored = self.stored.get(name)
        part = "" if stored is None else stored.split(".")[-2]
        if stored is None or (self.architecture == "gpt2" and part in TRANSPOSED):
            return None
        segment = self.file.read_packed(stored, self.experts.get(name))
        self.read |= set() if segment is None else {name}
        order = None if segment is None else self._order(part, len(segment.units))
        return segment if segment is None or order is None else segment.at(order)

    def _order(self, part: str, rows: int) -> Tensor | None:
        """Row permutation of q and k: GGUF's llama rotates neighbors (interleaved RoPE), we rotate halves."""
        if self.architecture != "llama" or part not in ("attn_q", "attn_k"):
            return None
        heads = self.config.n_heads if part == "attn_q" else self.config.kv_heads
        if rows != heads * self.config.head_size:
            return None  # is refused for its shape
        return torch.arange(rows).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten()

    def _published(self, name: str) -> str:
        gpt2 = self.architecture == "gpt2"
        parts, layers = (GPT2_PARTS, "transformer.h") if gpt2 else (PARTS, "model.layers")
        parts = parts | EXPERTS[self.family][1] if self.family in EXPERTS else parts
        *where, part, leaf = name.split(".") if name.count(".") else (name, "")
        if len(where) == 3 and part.isdigit():  # an expert by itself, as files of early 2024 have them
            parts = {part: parts.get(f"{where.pop()}_exps", name).replace("*", part)}
        prefix = f"{layers}.{where[1]}." if len(where) == 2 and where[0] == "blk" else ""
        return f"{prefix}{parts[part]}.{leaf}" if part in parts else name
