"""Conversions of config.json keys that several families share: RoPE scaling, sliding windows, activations, experts,
multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..config import ModelConfig
from ..errors import InputError
from .family import Values, Word

SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim",
    "intermediate_size": "d_ff", "max_position_embeddings": "max_seq_len", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
RMS = SIZES | {"rms_norm_eps": "norm_eps"}
LAYERNORM = SIZES | {"layer_norm_eps": "norm_eps"}
ATTENTION_BIAS = {"attention_bias": "qkv_bias+output_bias"}
LINEAR_BIAS = {"use_bias": "qkv_bias+output_bias+ffn_bias"}
MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
}  # fmt: skip


def _less(words: dict[str, str], *gone: str) -> dict[str, str]:
    return {word: name for word, name in words.items() if word not in gone}


SPARSE = _less(RMS, "intermediate_size") | {"moe_intermediate_size|intermediate_size": "d_ff"}
DENSE_FIRST = _less(RMS, "intermediate_size") | {
    "moe_intermediate_size": "d_ff", "intermediate_size": "dense_ff", "n_routed_experts": "n_experts",
    "num_experts_per_tok": "experts_per_token", "first_k_dense_replace": "n_dense_layers", "n_group": "expert_groups",
    "topk_group": "groups_used", "norm_topk_prob": "normalize_experts", "routed_scaling_factor": "expert_scale",
}  # fmt: skip


# Rotations


def _rotation(values: Values, parameters: Values, theta: float) -> tuple[float, dict[str, Any] | None, float]:
    """RoPE base, scaling and rotary share of a head, from `rope_parameters` or the older keys."""
    said = dict(parameters)
    theta = said.pop("rope_theta", None) or theta
    kind = said.pop("rope_type", None) or said.pop("type", None) or "default"
    said.pop("type", None)
    said.pop("mrope_section", None), said.pop("mrope_interleaved", None)  # M-RoPE of images: for text plain RoPE
    part = said.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
    if kind == "default":
        return float(theta), None, part
    if kind in ("yarn", "dynamic", "longrope"):  # are measured against the trained length
        trained = values.get("original_max_position_embeddings") or values["max_position_embeddings"]
        said.setdefault("original_max_position_embeddings", trained)
    return float(theta), {"rope_type": kind, **said}, part


def _rope_values(values: Values) -> Values:
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _read_rope(values: Values) -> dict[str, Any]:
    theta, scaling, part = _rotation(values, _rope_values(values), values.get("rope_theta", 1e4))
    if part != 1.0:
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _write_rope(c: ModelConfig) -> dict[str, Any]:
    """Both spellings: transformers 5 reads `rope_parameters`, earlier versions the other two."""
    return {
        "rope_parameters": {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling,
    }  # fmt: skip


def _read_growing_rope(values: Values) -> dict[str, Any]:
    """Ministral 3: the scale of queries by position is one of the RoPE parameters."""
    said = dict(_rope_values(values))
    beta, _ = said.pop("llama_4_scaling_beta"), said.pop("max_position_embeddings", None)
    growth = {"beta": beta, "length": said["original_max_position_embeddings"]}
    return _read_rope({**values, "rope_parameters": said}) | {"query_growth": growth}


def _write_growing_rope(c: ModelConfig) -> dict[str, Any]:
    values, growth = _write_rope(c), c.query_growth or {}
    more = {"llama_4_scaling_beta": growth["beta"], "original_max_position_embeddings": growth["length"]}
    return {"rope_parameters": values["rope_parameters"] | more}


def _read_partial(values: Values) -> dict[str, Any]:
    theta, scaling, part = _rotation(values, _rope_values(values), values.get("rope_theta", 1e4))
    size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_dim": int(size * part)}


def _write_partial(c: ModelConfig) -> dict[str, Any]:
    share = {"partial_rotary_factor": c.rotary_size / c.head_size}
    values = _write_rope(c)
    trained = (c.rope_scaling or {}).get("original_max_position_embeddings")
    more = {"original_max_position_embeddings": trained} if trained else {}
    return values | share | more | {"rope_parameters": values["rope_parameters"] | share}


def _read_rope_by_kind(values: Values) -> dict[str, Any]:
    said = _rope_values(values)
    full = said.get("full_attention", said)
    theta, scaling, _ = _rotation(values, full, values.get("rope_theta", 1e4))
    local_theta = values.get("rope_local_base_freq", theta)
    local, local_scaling, _ = _rotation(values, said.get("sliding_attention") or {}, local_theta)
    same = (local, local_scaling) == (theta, scaling)
    return {
        "rope_theta": theta, "rope_scaling": scaling,
        "local_rope": None if same else {"rope_theta": local, **(local_scaling or {})},
    }  # fmt: skip


def _write_rope_by_kind(c: ModelConfig) -> dict[str, Any]:
    said = {}
    for name, kind in (("full_attention", "f"), ("sliding_attention", "w")):
        theta, scaling = c.rope(kind)
        said[name] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    return {"rope_parameters": said}


def _read_alpha_rope(values: Values) -> dict[str, Any]:
    """Hunyuan: RoPE type `dynamic` with an alpha is NTK scaling by a fixed factor."""
    theta, scaling, _ = _rotation(values, _rope_values(values), values.get("rope_theta", 1e4))
    if scaling and scaling["rope_type"] == "dynamic" and scaling.get("alpha"):
        scaling = {"rope_type": "ntk", "factor": float(scaling["alpha"])}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _write_alpha_rope(c: ModelConfig) -> dict[str, Any]:
    scaling = dict(c.rope_scaling or {})
    if scaling.get("rope_type") == "ntk":
        scaling |= {"rope_type": "dynamic", "alpha": scaling["factor"]}
    return _write_rope(c.replace(rope_scaling=None)) | {
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": c.rope_theta},
        "rope_scaling": scaling or None,
    }


ROPE = Word(_read_rope, _write_rope)
GROWING_ROPE = Word(_read_growing_rope, _write_growing_rope)
PARTIAL_ROPE = Word(_read_partial, _write_partial)
ROPE_BY_KIND = Word(_read_rope_by_kind, _write_rope_by_kind)
ALPHA_ROPE = Word(_read_alpha_rope, _write_alpha_rope)


# Layers and their windows

WINDOW = {"sliding_window": "sliding_window"}  # of all layers
NAMED = {"w": "sliding_attention", "f": "full_attention", "n": "full_attention"}


def layer_types(full: str = "f", pattern: Callable[[Values], str] = lambda values: "f") -> Word:
    """Conversion of `layer_types`; full attention becomes the letter f or n; `pattern` replaces a missing list."""

    def read(values: Values) -> dict[str, Any]:
        names = values.get("layer_types")
        if strange := sorted(set(names or ()) - set(NAMED.values())):
            raise InputError(f"config.json: layer_types has {strange[0]!r}, which is not supported")
        letters = ["w" if name == "sliding_attention" else "f" for name in names or ()] or list(pattern(values))
        layers = values["num_hidden_layers"]
        whole = (letters * layers)[:layers]
        return {"layers": "".join(full if letter == "f" else letter for letter in whole)}

    def write(c: ModelConfig) -> dict[str, Any]:
        return {"layer_types": [NAMED[letter] for letter in c.kinds]}

    return Word(read, write)


def every(count: int) -> Callable[[Values], str]:
    """Layer pattern: full attention in every `count`-th layer, sliding windows in the others."""

    def letters(values: Values) -> str:
        period = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or count
        if not isinstance(period, int):
            raise InputError(f"config.json: sliding_window_pattern={period!r} is not supported (only a number is)")
        return "w" * (period - 1) + "f"

    return letters


def _read_qwen_window(values: Values) -> dict[str, Any]:
    names, layers = values.get("layer_types"), values["num_hidden_layers"]
    if not values.get("use_sliding_window", False) or not values.get("sliding_window"):
        return {"layers": "f", "sliding_window": None}
    first = min(values.get("max_window_layers", 0), layers)
    letters = (
        ["w" if x == "sliding_attention" else "f" for x in names] if names else "f" * first + "w" * (layers - first)
    )
    return {"layers": "".join(letters), "sliding_window": values["sliding_window"]}


def _write_qwen_window(c: ModelConfig) -> dict[str, Any]:
    windowed = "w" in c.kinds
    return {
        "use_sliding_window": windowed, "sliding_window": c.sliding_window if windowed else None,
        "max_window_layers": c.kinds.index("w") if windowed else 0,
        "layer_types": [NAMED[letter] for letter in c.kinds],
    }  # fmt: skip


def _read_no_rope(values: Values) -> dict[str, Any]:
    layers, interval = values["num_hidden_layers"], values.get("no_rope_layer_interval", 4)
    flags = values.get("no_rope_layers") or [(index + 1) % interval != 0 for index in range(layers)]
    return {"layers": "".join("f" if rotates else "n" for rotates in flags[:layers])}


def _read_hybrid(values: Values) -> dict[str, Any]:
    """EXAONE-4: in models with sliding windows, full-attention layers have no RoPE."""
    return layer_types("n" if values.get("sliding_window") else "f", every(4)).read(values)


QWEN_WINDOW = Word(_read_qwen_window, _write_qwen_window)
NO_ROPE = Word(_read_no_rope, lambda c: {"no_rope_layers": [int(letter == "f") for letter in c.kinds]})
HYBRID = Word(_read_hybrid, layer_types().write)


# Activations

GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
PLAIN = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip


def activation(word: str, table: dict[str, str], silent: str) -> Word:
    """Conversion of an activation name; `silent` is the default where a file names none."""
    names = {ours: theirs for theirs, ours in reversed(table.items())}

    def read(values: Values) -> dict[str, Any]:
        said = values.get(word, silent)
        if said not in table:
            raise InputError(f"config.json: {word}={said!r} is not supported (only {', '.join(table)} are)")
        return {"ffn": table[said]}

    return Word(read, lambda c: {word: names[c.ffn]})


# Multipliers, experts, latent attention

SQRT_WIDTH = Word(lambda values: {"embedding_scale": values["hidden_size"] ** 0.5}, lambda c: {})
LOGITS_DIVIDED = Word(
    lambda values: {"logit_scale": 1 / values.get("logits_scaling", 1.0)},
    lambda c: {"logits_scaling": 1 / c.logit_scale},
)
QUERY_SCALE = Word(
    lambda values: {"attention_scale": values["query_pre_attn_scalar"] ** -0.5},
    lambda c: {"query_pre_attn_scalar": round(c.score_scale**-2)},
)


def shared_experts(word: str) -> Word:
    """Conversion of shared experts, which we merge into one of their total width."""
    return Word(
        lambda values: {"shared_ff": (values.get(word) or 0) * values["moe_intermediate_size"]},
        lambda c: {word: c.shared_ff // c.ff_size},
    )


def _read_latent(values: Values) -> dict[str, Any]:
    size = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    parameters = _rope_values(values)
    theta, scaling, _ = _rotation(values, parameters, values.get("rope_theta", 1e4))
    return {
        "kv_rank": values["kv_lora_rank"], "q_rank": values.get("q_lora_rank") or 0, "head_dim": size,
        "rope_dim": values["qk_rope_head_dim"], "value_dim": values["v_head_dim"], "n_kv_heads": None,
        "rope_theta": theta, "rope_scaling": scaling, "attention_scale": size**-0.5 * _magnitude(scaling) ** 2,
    }  # fmt: skip


def _magnitude(scaling: Values | None) -> float:
    """YaRN's mscale, which DeepSeek multiplies into the attention scale."""
    weight, factor = (scaling or {}).get("mscale_all_dim", 0), (scaling or {}).get("factor", 1)
    return 0.1 * weight * math.log(factor) + 1 if weight and factor > 1 else 1.0


def _write_latent(c: ModelConfig) -> dict[str, Any]:
    return _write_rope(c) | {
        "kv_lora_rank": c.kv_rank, "q_lora_rank": c.q_rank or None, "qk_rope_head_dim": c.rope_dim,
        "qk_nope_head_dim": c.head_size - c.rope_dim, "v_head_dim": c.value_dim, "num_key_value_heads": c.n_heads,
    }  # fmt: skip


LATENT = Word(_read_latent, _write_latent)


def _read_falcon(values: Values) -> dict[str, Any]:
    if values.get("new_decoder_architecture"):
        shared = (values.get("num_ln_in_parallel_attn") or 2) == 1
        return {"n_kv_heads": values.get("num_kv_heads"), "residual": "shared" if shared else "parallel"}
    if not values.get("parallel_attn", True):
        raise InputError("config.json: parallel_attn=False is not supported (only True is)")
    return {"n_kv_heads": 1 if values.get("multi_query", True) else None, "residual": "shared"}


FALCON = Word(
    _read_falcon,
    lambda c: {
        "new_decoder_architecture": True, "num_kv_heads": c.kv_heads, "multi_query": True, "parallel_attn": True,
        "num_ln_in_parallel_attn": 1 if c.residual == "shared" else 2,
    },
)  # fmt: skip
FALCON_WIDTH = Word(
    lambda values: {"d_ff": values.get("ffn_hidden_size") or 4 * values["hidden_size"]},
    lambda c: {"ffn_hidden_size": c.ff_size},
)
INNER_WIDTH = Word(
    lambda values: {"d_ff": values.get("n_inner") or 4 * values["n_embd"]}, lambda c: {"n_inner": c.ff_size}
)
PARALLEL = Word(
    lambda values: {"residual": "parallel" if values.get("use_parallel_residual", True) else "serial"},
    lambda c: {"use_parallel_residual": {"parallel": True, "serial": False}[c.residual]},
)
SHARED_NORM = Word(
    lambda values: {"residual": "shared" if values.get("use_parallel_residual", False) else "serial"},
    lambda c: {"use_parallel_residual": {"shared": True, "serial": False}[c.residual]},
)


def dense_layers_by_name(word: str = "mlp_layer_types") -> Word:
    """Conversion of a list of "dense" and "sparse" layers, of which the dense ones come first."""

    def read(values: Values) -> dict[str, Any]:
        names = values.get(word) or ["dense"] * values.get("first_k_dense_replace", 1)
        dense = names.count("dense")
        if "sparse" in names[:dense]:
            raise InputError(f"config.json: {word} with sparse layers before dense ones is not supported")
        return {"n_dense_layers": dense}

    def write(c: ModelConfig) -> dict[str, Any]:
        dense = min(c.n_dense_layers, c.n_layers)
        return {word: ["dense"] * dense + ["sparse"] * (c.n_layers - dense), "first_k_dense_replace": dense}

    return Word(read, write)
