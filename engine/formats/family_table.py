"""Table of the supported model families, each a `Family`, used in both directions.

To add one: its names for our parts (`LLAMA` and what differs), its words for our fields (`family_words.py` has those
that several use), what it takes for granted, what its files leave unsaid, and what we do not compute. A test opens it
in transformers both ways. A configuration is saved as the first family that fits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from . import family_words as say
from .family import Family

# Our parts by their published names: those inside a layer without its prefix

LLAMA = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"), "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
}  # fmt: skip
PACKED = {"attention.qkv": "self_attn.qkv_proj", "ffn.gate_up": "mlp.gate_up_proj"}
SANDWICH = {
    "attention_post": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post": "post_feedforward_layernorm",
}  # fmt: skip
EXPERTS = {
    "ffn.router": "mlp.gate", "ffn.w_down": "mlp.experts.*.down_proj.weight",
    "ffn.w_gate_up": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
    "ffn.choice_bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "ffn.shared.down": "mlp.shared_experts.down_proj",
}  # fmt: skip
MIXTRAL = {
    "ffn.router": "block_sparse_moe.gate", "ffn.w_down": "block_sparse_moe.experts.*.w2.weight",
    "ffn.w_gate_up": ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"),
    "ffn.choice_bias": "block_sparse_moe.e_score_correction_bias",
}  # fmt: skip
LATENT = {
    "attention.q_down": "self_attn.q_a_proj", "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up": lambda c: "self_attn.q_b_proj" if c.q_rank else "self_attn.q_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa", "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
}  # fmt: skip
GPT2 = {
    "embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
    "attention_norm": "ln_1", "ffn_norm": "ln_2", "attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj",
    "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj",
}  # fmt: skip
GPTJ = {
    "embedding": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head", "attention_norm": "ln_1",
    "attention.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attention.output": "attn.out_proj",
    "ffn.up": "mlp.fc_in", "ffn.down": "mlp.fc_out",
}  # fmt: skip
NEOX = {
    "embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.qkv": "attention.query_key_value", "attention.output": "attention.dense",
    "ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h",
}  # fmt: skip
FALCON = {
    "embedding": "transformer.word_embeddings", "norm": "transformer.ln_f", "head": "lm_head",
    "attention_norm": lambda c: "input_layernorm" if c.residual == "shared" else "ln_attn", "ffn_norm": "ln_mlp",
    "attention.qkv": "self_attention.query_key_value", "attention.output": "self_attention.dense",
    "ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h",
}  # fmt: skip


# Which of their rows comes where in ours


def pairs_to_halves(count: int) -> Tensor:
    """Permutation from interleaved RoPE (rotating neighbors, GPT-J) to half-split RoPE (GPT-NeoX)."""
    return torch.cat([torch.arange(0, count, 2), torch.arange(1, count, 2)])


def interleaved(c: ModelConfig) -> Tensor:
    """Row permutation of q and k from interleaved to half-split RoPE, over the rotary columns of each head."""
    order = torch.arange(c.head_size)
    order[: c.rotary_size] = pairs_to_halves(c.rotary_size)
    turned = (torch.arange(c.n_heads + c.kv_heads)[:, None] * c.head_size + order).flatten()
    return torch.cat([turned, len(turned) + torch.arange(c.kv_heads * c.head_size)])


def by_group(c: ModelConfig) -> Tensor:
    """Row permutation of a qkv packed group by group: its queries, its key, its value (Falcon, GPT-NeoX)."""
    rows = torch.arange((c.n_heads + 2 * c.kv_heads) * c.head_size).view(c.kv_heads, -1, c.head_size)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


def gate_up_alternating(c: ModelConfig) -> Tensor:
    return pairs_to_halves(2 * c.ff_size)


def latent_query(c: ModelConfig) -> Tensor:
    """Row permutation of MLA's queries: published with the rotary part last and interleaved; here first, half-split."""
    still = c.head_size - c.rope_dim
    order = torch.cat([still + pairs_to_halves(c.rope_dim), torch.arange(still)])
    return (torch.arange(c.n_heads)[:, None] * c.head_size + order).flatten()


def latent_key(c: ModelConfig) -> Tensor:
    return torch.cat([torch.arange(c.kv_rank), c.kv_rank + pairs_to_halves(c.rope_dim)])


INTERLEAVED = {"attention.qkv": interleaved}
MLA = {"attention.q_up": latent_query, "attention.kv_down": latent_key}

# The families

SILU = {"hidden_act": ("silu",)}
LLAMA_BIAS = say.ATTENTION_BIAS | {"mlp_bias": "ffn_bias"}
QKV_BIAS = {"qkv_bias": True, "output_bias": False, "ffn_bias": False}
NO_BIAS = {"attention_bias": (False,)}
ALL_BIAS = {"qkv_bias": True, "output_bias": True, "ffn_bias": True, "norm_bias": True}
PLAIN_LN = {"norm": "layernorm", "norm_bias": False}
BIASED_LN = {"norm": "layernorm", "norm_bias": True}
LOCAL_EXPERTS = {"num_local_experts": "n_experts", "num_experts_per_tok": "experts_per_token"}
NUM_EXPERTS = {"num_experts|num_local_experts": "n_experts", "num_experts_per_tok": "experts_per_token"}
AUX = {"router_aux_loss_coef": "balance_loss"}
TOPK = {"norm_topk_prob": "normalize_experts"}
EVERY_LAYER_SPARSE = {"mlp_only_layers": ([],), "decoder_sparse_step": (1,)}
CAPS = {"final_logit_softcapping": "logit_softcap", "attn_logit_softcapping": "attention_softcap"}
SIGMOID_CHOICE = {"router": "sigmoid", "choice_bias": True}
TANH_GATES = {"gelu_pytorch_tanh": "geglu"}
GEMMA_ACT = say.activation("hidden_activation", TANH_GATES, "gelu_pytorch_tanh")
SLIDING = say.WINDOW
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
HALF = {"partial_rotary_factor": 0.5}
QUARTER = {"partial_rotary_factor": 0.25}
ONE_WAY = {"use_bidirectional_attention": (None, False)}
GEMMA2_ASSUMED = TIED | {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
GPT2_WORDS = {
    "vocab_size": "vocab_size", "n_embd": "d_model", "n_layer": "n_layers", "n_head": "n_heads",
    "n_positions": "max_seq_len", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
FALCON_WORDS = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "max_position_embeddings": "max_seq_len", "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings", "bias": "qkv_bias+output_bias+ffn_bias",
}  # fmt: skip
DEEPSEEK_ASSUMED = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def less(words: Mapping[str, Any], *gone: str) -> dict[str, Any]:
    return {word: name for word, name in words.items() if word not in gone}


LATENT_WORDS = less(say.DENSE_FIRST, "head_dim", "num_key_value_heads")
DROPOUT = say.Word(lambda v: {}, lambda c: {"embd_pdrop": c.dropout, "resid_pdrop": c.dropout, "attn_pdrop": 0.0})
V2_GROUPS = say.Word(
    lambda v: {
        "expert_groups": (v.get("n_group") or 1) if v.get("topk_method") == "group_limited_greedy" else 1,
        "groups_used": (v.get("topk_group") or 1) if v.get("topk_method") == "group_limited_greedy" else 1,
    },
    lambda c: {"topk_method": "group_limited_greedy", "n_group": c.expert_groups, "topk_group": c.groups_used},
)
QK_NORM = say.Word(
    lambda v: {"qk_norm": "head" if v.get("use_qk_norm") else "none"},
    lambda c: {"use_qk_norm": {"head": True, "none": False}[c.qk_norm]},
)
POST_NORM = say.Word(
    lambda v: {"norm_place": "both" if v.get("use_post_norm", True) else "before"},
    lambda c: {"use_post_norm": {"both": True, "before": False}[c.norm_place]},
)
HUNYUAN_TOPK = say.Word(
    lambda v: {"experts_per_token": v["moe_topk"] if isinstance(v["moe_topk"], int) else v["moe_topk"][0]},
    lambda c: {"moe_topk": c.experts_per_token},
)
ERNIE_DENSE = say.Word(
    lambda v: {"n_dense_layers": v.get("moe_layer_start_index", 1)},
    lambda c: {
        "moe_layer_start_index": c.n_dense_layers, "moe_layer_end_index": c.n_layers - 1, "moe_layer_interval": 1,
    },
)  # fmt: skip
MINIMAX_ROTARY = say.Word(
    lambda v: say.PARTIAL_ROPE.read(
        v if not v.get("rotary_dim") else {"partial_rotary_factor": v["rotary_dim"] / v["head_dim"], **v}
    ),
    say.PARTIAL_ROPE.write,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel", GPT2, GPT2_WORDS,
        (say.INNER_WIDTH, DROPOUT, say.activation("activation_function", say.PLAIN, "gelu_new")),
        granted=ALL_BIAS | {"norm": "layernorm", "position": "learned"},
        assumed=TIED | {"layer_norm_epsilon": 1e-5},
        refused={"scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,),
                 "add_cross_attention": (False,)},
        transposed=("attention.qkv", "attention.output", "ffn.up", "ffn.down"), layers="transformer.h",
    ),
    "llama": Family(
        "LlamaForCausalLM", LLAMA, say.RMS | LLAMA_BIAS, (say.ROPE,), assumed=UNTIED, refused=SILU,
    ),
    "mistral": Family(
        "MistralForCausalLM", LLAMA, say.RMS | SLIDING, (say.ROPE,), assumed=UNTIED | {"sliding_window": 4096},
        refused=SILU,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", LLAMA, say.RMS, (say.ROPE, say.QWEN_WINDOW), granted=QKV_BIAS, assumed=UNTIED, refused=SILU,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", LLAMA, say.RMS | say.ATTENTION_BIAS, (say.ROPE, say.QWEN_WINDOW),
        granted={"qk_norm": "head"}, assumed=UNTIED | {"head_dim": 128}, refused=SILU | NO_BIAS,
    ),
    "mixtral": Family(
        "MixtralForCausalLM", LLAMA | MIXTRAL, say.RMS | SLIDING | LOCAL_EXPERTS | AUX, (say.ROPE,),
        assumed=UNTIED | {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.001}, refused=SILU,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        LLAMA | EXPERTS | {
            "ffn.shared.gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            "ffn.shared.down": "mlp.shared_expert.down_proj", "ffn.shared_gate": "mlp.shared_expert_gate",
        },
        say.SPARSE | NUM_EXPERTS | TOPK | AUX
        | {"shared_expert_intermediate_size": "shared_ff", "qkv_bias": "qkv_bias"},
        (say.ROPE, say.QWEN_WINDOW), granted={"output_bias": False, "ffn_bias": False, "shared_gate": True},
        assumed=UNTIED | {"norm_topk_prob": False, "router_aux_loss_coef": 0.001, "qkv_bias": True},
        refused=SILU | EVERY_LAYER_SPARSE,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", LLAMA | EXPERTS, say.SPARSE | NUM_EXPERTS | TOPK | AUX, (say.ROPE, say.QWEN_WINDOW),
        granted={"qk_norm": "head"},
        assumed=UNTIED | {"norm_topk_prob": False, "router_aux_loss_coef": 0.001},
        refused=SILU | NO_BIAS | EVERY_LAYER_SPARSE,
    ),
    "gemma": Family(
        "GemmaForCausalLM", LLAMA, say.RMS,
        # Early files say gelu, and mean its tanh form: that is what the models were trained with.
        (say.ROPE, say.SQRT_WIDTH, say.activation("hidden_act", TANH_GATES | {"gelu": "geglu"}, "gelu")),
        assumed=TIED | {"head_dim": 256}, refused=NO_BIAS | ONE_WAY, offset=1.0,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", LLAMA | SANDWICH, say.RMS | SLIDING | CAPS,
        (say.ROPE, say.SQRT_WIDTH, say.QUERY_SCALE, GEMMA_ACT, say.layer_types(pattern=say.every(2))),
        granted={"norm_place": "both"}, refused=NO_BIAS | ONE_WAY, offset=1.0,
        assumed=GEMMA2_ASSUMED | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", LLAMA | SANDWICH, say.RMS | SLIDING | CAPS,
        (say.ROPE_BY_KIND, say.SQRT_WIDTH, say.QUERY_SCALE, GEMMA_ACT, say.layer_types(pattern=say.every(6))),
        granted={"norm_place": "both", "qk_norm": "head"}, refused=NO_BIAS | ONE_WAY, offset=1.0,
        assumed=GEMMA2_ASSUMED | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "vocab_size": 262_208,
                                  "max_position_embeddings": 131_072},
    ),
    "vaultgemma": Family(
        "VaultGemmaForCausalLM", LLAMA | {"ffn_norm": "pre_feedforward_layernorm"}, say.RMS | SLIDING | CAPS,
        (say.ROPE, say.SQRT_WIDTH, say.QUERY_SCALE, GEMMA_ACT, say.layer_types(pattern=say.every(2))),
        refused=NO_BIAS, offset=1.0,
        assumed=GEMMA2_ASSUMED | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "phi": Family(
        "PhiForCausalLM",
        LLAMA | {"norm": "model.final_layernorm", "attention.output": "self_attn.dense", "ffn.up": "mlp.fc1",
                 "ffn.down": "mlp.fc2"},
        say.LAYERNORM, (say.PARTIAL_ROPE, say.activation("hidden_act", say.PLAIN, "gelu_new")),
        granted=ALL_BIAS | {"norm": "layernorm", "residual": "shared", "head_bias": True},
        assumed=UNTIED | HALF | {"layer_norm_eps": 1e-5}, refused={"qk_layernorm": (False,)},
    ),
    "phi3": Family(
        "Phi3ForCausalLM", LLAMA | PACKED, say.RMS | SLIDING, (say.PARTIAL_ROPE,),
        assumed=UNTIED | {"rms_norm_eps": 1e-5}, refused=SILU,
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", LLAMA | {"ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"},
        less(say.SIZES, "head_dim") | SLIDING | say.LINEAR_BIAS | {"norm_epsilon": "norm_eps"},
        (say.ROPE, say.activation("hidden_act", say.PLAIN, "gelu_pytorch_tanh")), granted=BIASED_LN,
        assumed=TIED | {"norm_epsilon": 1e-5, "use_bias": True, "num_key_value_heads": 2},
    ),
    "olmo": Family(
        "OlmoForCausalLM", LLAMA,
        say.SIZES | say.ATTENTION_BIAS, (say.ROPE,), granted=PLAIN_LN | {"norm_eps": 1e-5, "norm_weight": False},
        assumed=UNTIED, refused=SILU | {"clip_qkv": (None,)},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        LLAMA | {"attention_post": "post_attention_layernorm", "ffn_post": "post_feedforward_layernorm"},
        say.RMS | say.ATTENTION_BIAS, (say.ROPE,), granted={"norm_place": "after", "qk_norm": "whole"},
        assumed=UNTIED | {"rms_norm_eps": 1e-5}, refused=SILU,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        LLAMA | {"attention_post": "post_attention_layernorm", "ffn_post": "post_feedforward_layernorm"},
        say.RMS | SLIDING | say.ATTENTION_BIAS, (say.ROPE_BY_KIND, say.layer_types(pattern=say.every(4))),
        granted={"norm_place": "after", "qk_norm": "whole"},
        assumed=UNTIED | {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096}, refused=SILU,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM", LLAMA | EXPERTS, say.RMS | say.ATTENTION_BIAS | NUM_EXPERTS | TOPK | AUX, (say.ROPE,),
        granted={"qk_norm": "whole"}, refused=SILU | {"clip_qkv": (None,)},
        assumed=UNTIED | {"norm_topk_prob": False, "router_aux_loss_coef": 0.01, "rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", LLAMA, say.RMS | LLAMA_BIAS, (say.ROPE, say.NO_ROPE),
        assumed=TIED | {"rope_theta": 2e6, "num_key_value_heads": 4}, refused=SILU | {"use_sliding_window": (False,)},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", NEOX,
        less(say.LAYERNORM, "head_dim", "num_key_value_heads") | say.ATTENTION_BIAS,
        (say.PARTIAL_ROPE, say.PARALLEL, say.activation("hidden_act", say.PLAIN, "gelu")),
        granted=BIASED_LN | {"ffn_bias": True},
        assumed=UNTIED | {"attention_bias": True, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        orders={"attention.qkv": by_group}, layers="gpt_neox.layers",
    ),
    "gptj": Family(
        "GPTJForCausalLM", GPTJ, GPT2_WORDS | {"rotary_dim": "rotary_dim"},
        (say.INNER_WIDTH, say.activation("activation_function", say.PLAIN, "gelu_new")),
        granted=BIASED_LN | {"residual": "shared", "ffn_bias": True, "qkv_bias": False, "output_bias": False,
                             "head_bias": True},
        assumed=UNTIED | {"rotary_dim": 64, "layer_norm_epsilon": 1e-5}, orders=INTERLEAVED, layers="transformer.h",
    ),
    "stablelm": Family(
        "StableLmForCausalLM", LLAMA, less(say.LAYERNORM, "head_dim") | {"use_qkv_bias": "qkv_bias"},
        (say.PARTIAL_ROPE, say.SHARED_NORM), granted=BIASED_LN | {"output_bias": False, "ffn_bias": False},
        assumed=UNTIED | QUARTER | {"use_qkv_bias": False, "layer_norm_eps": 1e-5},
        refused=SILU | {"qk_layernorm": (False,)},
    ),
    "cohere": Family(
        "CohereForCausalLM", LLAMA,
        less(say.LAYERNORM, "head_dim") | say.ATTENTION_BIAS | {"logit_scale": "logit_scale"},
        (say.ROPE,), granted=PLAIN_LN | {"residual": "shared", "ffn_bias": False}, orders=INTERLEAVED,
        assumed=TIED | {"rope_theta": 5e5, "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "attention_bias": False},
        refused=SILU | {"use_qk_norm": (False,)},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM", LLAMA,
        less(say.LAYERNORM, "head_dim") | SLIDING | say.ATTENTION_BIAS | {"logit_scale": "logit_scale"},
        (say.ROPE, say.layer_types("n", say.every(4))),
        granted=PLAIN_LN | {"residual": "shared", "ffn_bias": False}, orders=INTERLEAVED,
        assumed=TIED | {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "attention_bias": False, "sliding_window": 4096},
        refused=SILU,
    ),
    "granite": Family(
        "GraniteForCausalLM", LLAMA, less(say.RMS, "head_dim") | LLAMA_BIAS | say.MULTIPLIERS,
        (say.ROPE, say.LOGITS_DIVIDED), assumed=UNTIED | {"attention_multiplier": 1.0}, refused=SILU,
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        LLAMA | {"ffn.router": "block_sparse_moe.router.layer", "ffn.w_down": "block_sparse_moe.output_linear.weight",
                 "ffn.w_gate_up": "block_sparse_moe.input_linear.weight"},
        less(say.RMS, "head_dim") | say.ATTENTION_BIAS | say.MULTIPLIERS | LOCAL_EXPERTS | AUX,
        (say.ROPE, say.LOGITS_DIVIDED), refused=SILU,
        assumed=UNTIED | {"attention_multiplier": 1.0, "router_aux_loss_coef": 0.001},
    ),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM", LLAMA | {"attention_post": "post_norm1", "ffn_post": "post_norm2"},
        say.RMS | LLAMA_BIAS | say.MULTIPLIERS | {"logits_scaling": "logit_scale"}, (say.ROPE, POST_NORM),
        assumed=UNTIED, refused=SILU,
    ),
    "glm": Family(
        "GlmForCausalLM", LLAMA | {"ffn.gate_up": "mlp.gate_up_proj"}, say.RMS | {"attention_bias": "qkv_bias"},
        (say.PARTIAL_ROPE,), granted={"output_bias": False, "ffn_bias": False}, orders=INTERLEAVED,
        assumed=UNTIED | HALF | {"attention_bias": True, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
                                 "num_key_value_heads": 2}, refused=SILU,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        LLAMA | {"ffn.gate_up": "mlp.gate_up_proj", "attention_post": "post_self_attn_layernorm",
                 "ffn_post": "post_mlp_layernorm"},
        say.RMS | {"attention_bias": "qkv_bias"}, (say.PARTIAL_ROPE,),
        granted={"output_bias": False, "ffn_bias": False, "norm_place": "both"}, orders=INTERLEAVED,
        assumed=UNTIED | HALF | {"attention_bias": True, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
                                 "num_key_value_heads": 2}, refused=SILU,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", LLAMA | EXPERTS, say.DENSE_FIRST | {"attention_bias": "qkv_bias"},
        (say.PARTIAL_ROPE, QK_NORM, say.shared_experts("n_shared_experts")),
        granted=SIGMOID_CHOICE | {"output_bias": False, "ffn_bias": False}, refused=SILU,
        assumed=UNTIED | HALF | DEEPSEEK_ASSUMED | {"norm_topk_prob": True, "n_shared_experts": 1, "rms_norm_eps": 1e-5,
                                                    "first_k_dense_replace": 1},
    ),
    "dots1": Family(
        "Dots1ForCausalLM", LLAMA | EXPERTS, say.DENSE_FIRST | SLIDING | say.ATTENTION_BIAS,
        (say.ROPE, say.layer_types(), say.shared_experts("n_shared_experts")),
        granted=SIGMOID_CHOICE | {"qk_norm": "head", "ffn_bias": False},
        assumed=UNTIED | DEEPSEEK_ASSUMED | {"norm_topk_prob": False, "sliding_window": 4096, "attention_bias": False},
        refused=SILU,
    ),
    "solar_open": Family(
        "SolarOpenForCausalLM", LLAMA | EXPERTS, less(say.DENSE_FIRST, "first_k_dense_replace") | say.ATTENTION_BIAS,
        (say.PARTIAL_ROPE, say.shared_experts("n_shared_experts")),
        granted=SIGMOID_CHOICE | {"ffn_bias": False, "output_bias": False}, refused=SILU,
        assumed=UNTIED | DEEPSEEK_ASSUMED | {"norm_topk_prob": True, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
                                             "n_shared_experts": 1, "head_dim": 128},
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        LLAMA | {"attention_post": "post_attention_layernorm", "ffn_post": "post_feedforward_layernorm"},
        say.RMS | SLIDING, (say.ROPE, say.HYBRID), granted={"norm_place": "after", "qk_norm": "head"},
        assumed=UNTIED | {"rms_norm_eps": 1e-5, "sliding_window": 4096}, refused=SILU,
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM", LLAMA | EXPERTS | {"ffn.choice_bias": "mlp.e_score_correction_bias"},
        less(say.DENSE_FIRST, "first_k_dense_replace", "n_routed_experts") | SLIDING | {"num_experts": "n_experts"},
        (say.ROPE, say.HYBRID, say.shared_experts("num_shared_experts"), say.dense_layers_by_name()),
        granted=SIGMOID_CHOICE | {"qk_norm": "head"}, refused=SILU,
        assumed=UNTIED | DEEPSEEK_ASSUMED | {"norm_topk_prob": True, "rms_norm_eps": 1e-5, "num_shared_experts": 1,
                                             "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
                                             "sliding_window": 4096},
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM", LLAMA,
        say.RMS | {"attention_bias": "qkv_bias", "attention_out_bias": "output_bias", "mlp_bias": "ffn_bias"},
        (say.ROPE,), assumed=UNTIED | {"attention_bias": True, "head_dim": 128}, refused=SILU,
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM", LLAMA, say.RMS | say.LINEAR_BIAS, (say.ROPE,),
        assumed=TIED | {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 2},
        refused=SILU, orders=INTERLEAVED,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        LLAMA | EXPERTS | {"ffn.choice_bias": "mlp.moe_statics.e_score_correction_bias"},
        less(say.RMS, "intermediate_size", "head_dim") | AUX | {
            "moe_intermediate_size": "d_ff", "intermediate_size": "dense_ff",
            "moe_num_experts|num_experts": "n_experts",
            "moe_k|num_experts_per_tok": "experts_per_token",
        },
        (say.ROPE, ERNIE_DENSE, say.shared_experts("moe_num_shared_experts")), granted={"choice_bias": True},
        assumed=TIED | {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "moe_num_shared_experts": 2, "moe_k": 6,
                        "router_aux_loss_coef": 0.001, "num_key_value_heads": 4},
        refused=SILU | {"use_bias": (False,), "moe_layer_interval": (1,)}, orders=INTERLEAVED,
        framed=("ffn.choice_bias",),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        LLAMA | {"attention.q_norm": "self_attn.query_layernorm", "attention.k_norm": "self_attn.key_layernorm"},
        say.RMS | say.ATTENTION_BIAS, (say.ALPHA_ROPE,), granted={"qk_norm": "after"},
        assumed=UNTIED | {"rms_norm_eps": 1e-5}, refused=SILU,
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM",
        LLAMA | EXPERTS | {
            "ffn.router": "mlp.gate.wg", "ffn.shared.down": "mlp.shared_mlp.down_proj",
            "ffn.shared.gate_up": ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
            "attention.q_norm": "self_attn.query_layernorm", "attention.k_norm": "self_attn.key_layernorm",
        },
        less(say.RMS, "intermediate_size") | say.ATTENTION_BIAS | {
            "num_experts": "n_experts", "intermediate_size": "d_ff+shared_ff"},
        (say.ALPHA_ROPE, HUNYUAN_TOPK), granted={"qk_norm": "after"},
        assumed=UNTIED | {"rms_norm_eps": 1e-5}, refused=SILU,
    ),
    "nemotron": Family(
        "NemotronForCausalLM", LLAMA, say.SIZES | LLAMA_BIAS | {"norm_eps": "norm_eps"},
        (say.PARTIAL_ROPE, say.activation("hidden_act", say.PLAIN, "relu2")), granted=BIASED_LN,
        assumed=UNTIED | HALF | {"attention_bias": False, "mlp_bias": False, "norm_eps": 1e-5}, offset=1.0,
    ),
    "arcee": Family(
        "ArceeForCausalLM", LLAMA, say.RMS | LLAMA_BIAS, (say.ROPE, say.activation("hidden_act", say.PLAIN, "relu2")),
        assumed=UNTIED | {"rms_norm_eps": 1e-5},
    ),
    "jais2": Family(
        "Jais2ForCausalLM", LLAMA, say.LAYERNORM | LLAMA_BIAS,
        (say.ROPE, say.activation("hidden_act", say.PLAIN, "relu2")), granted=BIASED_LN,
        assumed=UNTIED | {"attention_bias": True, "mlp_bias": True, "layer_norm_eps": 1e-5},
    ),
    "helium": Family(
        "HeliumForCausalLM", LLAMA, say.RMS | LLAMA_BIAS, (say.ROPE,), orders=INTERLEAVED,
        assumed=UNTIED | {"rope_theta": 1e5, "head_dim": 128, "rms_norm_eps": 1e-8}, refused=SILU,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM", LLAMA | MIXTRAL, say.RMS | LOCAL_EXPERTS | AUX, (MINIMAX_ROTARY,),
        granted=SIGMOID_CHOICE | {"qk_norm": "whole"}, refused=SILU,
        assumed=UNTIED | {"rope_theta": 5e6, "head_dim": 128, "router_aux_loss_coef": 0.001},
    ),
    "ministral": Family(
        "MinistralForCausalLM", LLAMA, say.RMS | SLIDING, (say.ROPE, say.layer_types(pattern=lambda values: "w")),
        assumed=UNTIED | {"sliding_window": 4096}, refused=SILU,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM", LLAMA, say.RMS | SLIDING, (say.GROWING_ROPE,), refused=SILU,
        assumed=UNTIED | {
            "rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "cwm": Family(
        "CwmForCausalLM", LLAMA, say.RMS | SLIDING | {"mlp_bias": "ffn_bias"},
        (say.ROPE, say.layer_types(pattern=lambda values: "fwww")),
        granted={"qkv_bias": False, "output_bias": False},
        assumed=UNTIED | {
            "rope_theta": 1e6, "rms_norm_eps": 1e-5, "head_dim": 128, "sliding_window": 8192, "rope_scaling": {
                "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
        refused=SILU,
    ),
    "falcon": Family(
        "FalconForCausalLM", FALCON, FALCON_WORDS,
        (say.ROPE, say.FALCON, say.FALCON_WIDTH, say.activation("activation", say.PLAIN, "gelu")),
        granted=BIASED_LN | {"residual": "parallel"}, assumed=TIED | {"layer_norm_epsilon": 1e-5},
        refused={"alibi": (False,)}, orders={"attention.qkv": by_group}, layers="transformer.h",
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        LLAMA | {
            "attention.sinks": "self_attn.sinks", "ffn.router": "mlp.router",
            "ffn.w_gate_up": "mlp.experts.gate_up_proj", "ffn.b_gate_up": "mlp.experts.gate_up_proj_bias",
            "ffn.w_down": "mlp.experts.down_proj", "ffn.b_down": "mlp.experts.down_proj_bias",
        },
        say.RMS | SLIDING | say.ATTENTION_BIAS | LOCAL_EXPERTS | AUX,
        (say.ROPE, say.layer_types(pattern=lambda values: "wf")),
        granted={"ffn": "clamped_swiglu", "attention_sinks": True, "router_bias": True, "expert_bias": True,
                 "ffn_bias": False},
        assumed=UNTIED | {"attention_bias": True, "head_dim": 64, "sliding_window": 128, "rms_norm_eps": 1e-5,
                          "rope_theta": 1.5e5, "router_aux_loss_coef": 0.001, "rope_scaling": {
                              "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                              "truncate": False, "original_max_position_embeddings": 4096}},
        refused=SILU | {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        orders={"ffn.w_gate_up": gate_up_alternating, "ffn.b_gate_up": gate_up_alternating},
        transposed=("ffn.w_gate_up", "ffn.w_down"),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", LLAMA | EXPERTS | LATENT, less(LATENT_WORDS, "n_group", "topk_group", "norm_topk_prob")
        | say.ATTENTION_BIAS, (say.LATENT, V2_GROUPS, say.shared_experts("n_shared_experts")),
        granted={"normalize_experts": False, "ffn_bias": False}, orders=MLA,
        assumed=UNTIED | DEEPSEEK_ASSUMED | {"attention_bias": False},
        refused=SILU | {"norm_topk_prob": (False,), "mlp_bias": (False,)},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", LLAMA | EXPERTS | LATENT, LATENT_WORDS | say.ATTENTION_BIAS,
        (say.LATENT, say.shared_experts("n_shared_experts")), granted=SIGMOID_CHOICE | {"ffn_bias": False}, orders=MLA,
        assumed=UNTIED | {"attention_bias": False, "norm_topk_prob": True, "n_shared_experts": 1, "n_group": 8,
                          "topk_group": 4, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
        refused=SILU | {"rope_interleave": (True,)},
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM", LLAMA | EXPERTS | LATENT,
        less(LATENT_WORDS, "first_k_dense_replace") | say.ATTENTION_BIAS,
        (say.LATENT, say.shared_experts("n_shared_experts"), say.dense_layers_by_name()),
        granted=SIGMOID_CHOICE | {"ffn_bias": False}, orders=MLA,
        assumed=UNTIED | DEEPSEEK_ASSUMED | {"attention_bias": False, "norm_topk_prob": True, "n_shared_experts": 1,
                                             "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
                                             "routed_scaling_factor": 1.8},
        refused=SILU | {"rope_interleave": (True,)},
    ),
}  # fmt: skip

# Language parts of multimodal models, which are these families under another name.
ALIASES = {
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
    "gemma3": "gemma3_text", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2",
}  # fmt: skip
