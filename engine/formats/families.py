"""The names the world gives to our tensors.

Every published architecture that `Transformer` spans has its own vocabulary: `transformers` says `hidden_size` where we
say `d_model`, stores q, k and v apart where we multiply once, and transposes GPT-2. This file is the dictionary, both
ways and nothing else: `describe(config)` gives the published `config.json`, `understand(values)` reads one back, and
`pieces(config)` lists, for each tensor of ours, the published tensors it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError

TRAINING_ONLY = ("dropout", "balance_loss", "router_z_loss")  # what a published config.json has no standard word for


@dataclass(frozen=True)
class Piece:
    """One tensor of ours from published ones: joined by rows, perhaps transposed, perhaps one set an expert."""

    ours: str
    groups: tuple[tuple[str, ...], ...]  # one group of joined tensors, or one for each expert
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    stacked: bool = False

    def fill(self, target: Tensor, read: Callable[[str], Tensor]) -> None:
        """Copy the published tensors into our tensor, piece by piece: nothing is ever held twice."""
        for part, name in self._parts(target):
            source = read(name).T if self.transposed else read(name)
            if part.shape != source.shape:
                wanted = tuple(part.T.shape if self.transposed else part.shape)
                raise InputError(f"tensor {name} has shape {tuple(read(name).shape)}, config.json says {wanted}")
            part.copy_(source)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our tensor as the published ones."""
        for part, name in self._parts(tensor):
            yield name, (part.T if self.transposed else part).contiguous()

    def _parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, str]]:
        members = tensor.unbind(0) if self.stacked else (tensor,)
        for member, names in zip(members, self.groups):
            parts = member.split(self.sizes) if len(names) > 1 else (member,)
            yield from zip(parts, names)

    @property
    def theirs(self) -> list[str]:
        return [name for group in self.groups for name in group]


# config.json


def describe(config: ModelConfig) -> dict[str, Any]:
    """The published config.json of this architecture; our own (`model_type: warploom`) where no published one fits."""
    kind = architecture_of(config)
    if kind == "warploom":
        return {"model_type": kind, "architectures": ["Transformer"], "warploom": config.to_dict()}
    values = _describe_gpt2(config) if kind == "gpt2" else _describe_llama_like(config, kind)
    extras = {name: getattr(config, name) for name in TRAINING_ONLY}
    return {"model_type": kind, "architectures": [CLASSES[kind]], **values, "warploom": extras}


CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def architecture_of(config: ModelConfig) -> str:
    """Which published architecture this configuration is, if any."""
    c = config
    if c.logit_softcap or c.attention_softcap or c.n_shared_experts or (c.rope_scaling or {}).get("rope_type") == "ntk":
        return "warploom"
    if (c.norm, c.position, c.bias) == ("layernorm", "learned", True) and c.ffn in ("gelu", "relu"):
        plain = not (c.qk_norm or c.n_experts or c.sliding_window or c.head_dim or c.qkv_bias is False)
        return "gpt2" if plain and c.kv_heads == c.n_heads else "warploom"
    if (c.norm, c.position, c.ffn) != ("rmsnorm", "rope", "swiglu"):
        return "warploom"
    if c.n_experts:
        normalized = c.router == "softmax" and c.normalize_experts and c.experts_per_token > 1
        return "mixtral" if normalized and not (c.bias or c.has_qkv_bias or c.qk_norm) else "warploom"
    if c.qk_norm:
        return "qwen3" if not (c.bias or c.has_qkv_bias) else "warploom"
    if c.has_qkv_bias != c.bias:
        return "qwen2" if c.has_qkv_bias else "warploom"
    if c.sliding_window:
        return "mistral" if not c.bias else "warploom"
    return "llama"


def _describe_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "n_embd": c.d_model, "n_layer": c.n_layers, "n_head": c.n_heads,
        "n_inner": c.ff_size, "n_positions": c.max_seq_len, "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new" if c.ffn == "gelu" else c.ffn, "tie_word_embeddings": c.tie_embeddings,
        "embd_pdrop": c.dropout, "resid_pdrop": c.dropout, "attn_pdrop": 0.0,
    }  # fmt: skip


def _describe_llama_like(c: ModelConfig, kind: str) -> dict[str, Any]:
    values = {
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_size,
        "intermediate_size": c.ff_size, "max_position_embeddings": c.max_seq_len, "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu", "tie_word_embeddings": c.tie_embeddings,
        # Both spellings: `rope_parameters` is read by transformers 5, the other two by everything before it.
        "rope_parameters": {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling,
    }  # fmt: skip
    if kind == "llama":
        values |= {"attention_bias": c.bias, "mlp_bias": c.bias}
    if kind in ("mistral", "mixtral"):
        values |= {"sliding_window": c.sliding_window}
    if kind in ("qwen2", "qwen3"):
        windowed = c.sliding_window is not None
        layer = "sliding_attention" if windowed else "full_attention"
        values |= {"use_sliding_window": windowed, "sliding_window": c.sliding_window, "max_window_layers": 0}
        values |= {"layer_types": [layer] * c.n_layers}
    if kind == "mixtral":
        values |= {"num_local_experts": c.n_experts, "num_experts_per_tok": c.experts_per_token}
        values |= {"router_aux_loss_coef": c.balance_loss}
    return values


def understand(values: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` a published config.json describes; what we would compute differently is refused by name."""
    kind = values.get("model_type")
    if kind == "warploom":
        return ModelConfig.from_dict(values["warploom"])
    if kind not in CLASSES:
        raise InputError(
            f"config.json: model_type {kind!r} is not supported; supported: {', '.join(CLASSES)}, warploom"
        )
    extras = {name: value for name, value in values.get("warploom", {}).items() if name in TRAINING_ONLY}
    fields = _understand_gpt2(values) if kind == "gpt2" else _understand_llama_like(values, kind)
    return ModelConfig(**{**fields, **extras})


def _understand_gpt2(v: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unless(v, "scale_attn_by_inverse_layer_idx", (False, None))
    _refuse_unless(v, "scale_attn_weights", (True, None))
    _refuse_unless(v, "add_cross_attention", (False, None))
    _refuse_unless(v, "activation_function", ("gelu_new", "gelu_pytorch_tanh", "relu", None))
    return dict(
        vocab_size=_need(v, "vocab_size"), d_model=_need(v, "n_embd"), n_layers=_need(v, "n_layer"),
        n_heads=_need(v, "n_head"), d_ff=v.get("n_inner") or 4 * v["n_embd"], max_seq_len=_need(v, "n_positions"),
        norm="layernorm", norm_eps=v.get("layer_norm_epsilon", 1e-5), position="learned", bias=True,
        ffn="relu" if v.get("activation_function") == "relu" else "gelu",
        tie_embeddings=v.get("tie_word_embeddings", True),
    )  # fmt: skip


def _understand_llama_like(v: Mapping[str, Any], kind: str) -> dict[str, Any]:
    _refuse_unless(v, "hidden_act", ("silu", None))
    bias = bool(v.get("attention_bias", False))
    _refuse_unless(v, "mlp_bias", (bias, None) if bias else (False, None))
    if kind == "qwen3":
        _refuse_unless(v, "attention_bias", (False, None))
    theta, scaling = _understand_rope(v)
    head_dim = v.get("head_dim")
    if head_dim == _need(v, "hidden_size") // _need(v, "num_attention_heads"):
        head_dim = None  # what follows from other fields stays unsaid
    fields = dict(
        vocab_size=_need(v, "vocab_size"), d_model=_need(v, "hidden_size"), n_layers=_need(v, "num_hidden_layers"),
        n_heads=_need(v, "num_attention_heads"), n_kv_heads=v.get("num_key_value_heads"), head_dim=head_dim,
        d_ff=_need(v, "intermediate_size"), max_seq_len=_need(v, "max_position_embeddings"),
        norm_eps=v.get("rms_norm_eps", 1e-6), tie_embeddings=v.get("tie_word_embeddings", False), bias=bias,
        rope_theta=theta, rope_scaling=scaling, sliding_window=_understand_window(v, kind), qk_norm=kind == "qwen3",
        qkv_bias=True if kind == "qwen2" else None,
    )  # fmt: skip
    if kind == "mixtral":
        fields |= dict(n_experts=_need(v, "num_local_experts"), experts_per_token=_need(v, "num_experts_per_tok"))
        fields |= dict(balance_loss=v.get("router_aux_loss_coef", 0.001))
    return fields


def _understand_rope(v: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    parameters = dict(v.get("rope_parameters") or v.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or v.get("rope_theta") or 10_000.0
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    if v.get("partial_rotary_factor") not in (None, 1.0) or parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return float(theta), None
    if kind in ("yarn", "dynamic"):  # transformers measures these against the trained length
        parameters.setdefault("original_max_position_embeddings", v["max_position_embeddings"])
    return float(theta), {"rope_type": kind, **parameters}


def _understand_window(v: Mapping[str, Any], kind: str) -> int | None:
    if kind not in ("mistral", "mixtral", "qwen2", "qwen3"):
        return None
    if kind.startswith("qwen") and not v.get("use_sliding_window", False):
        return None
    layers = set(v.get("layer_types") or ["sliding_attention"])
    if layers == {"full_attention"}:
        return None
    if layers != {"sliding_attention"} or (kind.startswith("qwen") and v.get("max_window_layers", 0) > 0):
        raise InputError("config.json: layers that mix sliding and full attention (layer_types) are not supported")
    return v.get("sliding_window")


def _need(values: Mapping[str, Any], field: str) -> Any:
    if values.get(field) is None:
        raise InputError(f"config.json has no field {field!r}, which model_type {values['model_type']!r} needs")
    return values[field]


def _refuse_unless(values: Mapping[str, Any], field: str, accepted: tuple) -> None:
    if values.get(field) not in accepted:
        raise InputError(f"config.json: {field}={values[field]!r} is not supported (only {accepted[0]!r} is)")


# model.safetensors


def pieces(config: ModelConfig, names: list[str]) -> list[Piece]:
    """For each tensor of ours (by name), the published tensors it is made of."""
    kind = architecture_of(config)
    if kind == "warploom":
        return [Piece(name, ((name,),)) for name in names]
    translate = _gpt2_piece if kind == "gpt2" else _llama_piece
    return [translate(config, name) for name in names]


GPT2_NAMES = {
    "embedding": "wte", "positions": "wpe", "norm": "ln_f", "attention_norm": "ln_1", "ffn_norm": "ln_2",
    "attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj",
}  # fmt: skip
LLAMA_NAMES = {
    "embedding": "embed_tokens", "norm": "norm", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attention.output": "self_attn.o_proj", "ffn.down": "mlp.down_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "ffn.router": "block_sparse_moe.gate",
}  # fmt: skip


def _gpt2_piece(config: ModelConfig, name: str) -> Piece:
    layer, part, kind = _dissect(name)
    if part == "head":
        return Piece(name, (("lm_head.weight",),))
    prefix = "transformer." if layer is None else f"transformer.h.{layer}."
    # GPT-2 was published as (inputs, outputs), the transpose of every matrix since.
    transposed = kind == "weight" and ("." in part)
    return Piece(name, ((f"{prefix}{GPT2_NAMES[part]}.{kind}",),), transposed=transposed)


def _llama_piece(config: ModelConfig, name: str) -> Piece:
    c = config
    layer, part, kind = _dissect(name)
    if part == "head":
        return Piece(name, (("lm_head.weight",),))
    prefix = "model." if layer is None else f"model.layers.{layer}."
    if part == "attention.qkv":
        sizes = tuple(heads * c.head_size for heads in (c.n_heads, c.kv_heads, c.kv_heads))
        return Piece(name, (tuple(f"{prefix}self_attn.{x}_proj.{kind}" for x in "qkv"),), sizes)
    if part == "ffn.gate_up":
        return Piece(name, (tuple(f"{prefix}mlp.{x}_proj.{kind}" for x in ("gate", "up")),), (c.ff_size, c.ff_size))
    if part == "ffn":  # the experts' matrices, one published set an expert
        inner = ("w1", "w3") if kind == "w_gate_up" else ("w2",)
        experts = [f"{prefix}block_sparse_moe.experts.{expert}." for expert in range(c.n_experts)]
        groups = tuple(tuple(f"{expert}{matrix}.weight" for matrix in inner) for expert in experts)
        return Piece(name, groups, (c.ff_size,) * len(inner), stacked=True)
    return Piece(name, ((f"{prefix}{LLAMA_NAMES[part]}.{kind}",),))


def _dissect(name: str) -> tuple[str | None, str, str]:
    """blocks.3.attention.qkv.weight → ("3", "attention.qkv", "weight")."""
    path, kind = name.rsplit(".", 1)
    if not path.startswith("blocks."):
        return None, path, kind
    _, layer, part = path.split(".", 2)
    return layer, part, kind


def ignorable(name: str) -> bool:
    """Published tensors that carry nothing learned: causal masks and rotary tables of older checkpoints."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
