"""The one truth about an architecture.

A language model here is data: `ModelConfig` names every choice on the road from GPT-2 (LayerNorm, learned positions,
GELU, biases) to Llama (RMSNorm, RoPE, SwiGLU, grouped queries), Qwen3 (QK-norm) and Mixtral (sparse experts). One
`Transformer` reads it; nothing else in the house asks "which model is this?".

This file imports no torch, so that the command line can show every field as a flag in a blink.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InputError

PRESETS: dict[str, dict[str, Any]] = {
    # Small ones to train from nothing, on a laptop; the first is nanoGPT's example for a CPU as a Llama.
    "llama-characters": dict(vocab_size=128, d_model=128, n_layers=4, n_heads=4, max_seq_len=64),
    "llama-tiny": dict(vocab_size=2048, d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, max_seq_len=256),
    "moe-tiny": dict(
        vocab_size=2048, d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, max_seq_len=256, d_ff=256, n_experts=8,
    ),
    "llama-15m": dict(vocab_size=32_000, d_model=288, n_layers=6, n_heads=6, d_ff=768, max_seq_len=256),
    "llama-110m": dict(vocab_size=32_000, d_model=768, n_layers=12, n_heads=12, d_ff=2048, max_seq_len=1024),
    # The shapes the world knows.
    "gpt2-124m": dict(
        vocab_size=50_257, d_model=768, n_layers=12, n_heads=12, d_ff=3072, max_seq_len=1024,
        norm="layernorm", norm_eps=1e-5, position="learned", ffn="gelu", bias=True,
    ),
    "llama-1b": dict(
        vocab_size=128_256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192,
        max_seq_len=131_072, norm_eps=1e-5, rope_theta=500_000.0,
        rope_scaling=dict(
            rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "llama-8b": dict(
        vocab_size=128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336,
        max_seq_len=8192, norm_eps=1e-5, rope_theta=500_000.0, tie_embeddings=False,
    ),
    "qwen3-0.6b": dict(
        vocab_size=151_936, d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=3072,
        max_seq_len=40_960, rope_theta=1e6, qk_norm=True,
    ),
    "mixtral-8x7b": dict(
        vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336, max_seq_len=32_768,
        norm_eps=1e-5, rope_theta=1e6, tie_embeddings=False, n_experts=8, experts_per_token=2, balance_loss=0.02,
    ),
}  # fmt: skip

ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {  # the numbers that each needs
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Every architectural choice of a `Transformer`. Fields left at None follow from the others."""

    vocab_size: int
    """Number of rows of the embedding table; the tokenizer's vocabulary must fit in it."""
    d_model: int = 512
    """Width of the residual stream."""
    n_layers: int = 6
    """Number of blocks, each attention then feed-forward."""
    n_heads: int = 8
    """Number of query heads."""
    n_kv_heads: int | None = None
    """Number of key/value heads: None = n_heads (MHA), 1 = multi-query, in between = grouped (GQA)."""
    head_dim: int | None = None
    """Width of one head; None = d_model / n_heads."""
    d_ff: int | None = None
    """Hidden width of the feed-forward (of one expert, when sparse); None = 4 d, or 8/3 d for swiglu."""
    max_seq_len: int = 512
    """Longest sequence the model accepts."""
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    """Normalization before each sublayer and before the head."""
    norm_eps: float = 1e-6
    """Added to the variance inside a norm."""
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How the model knows where a token stands."""
    ffn: Literal["swiglu", "gelu", "relu", "relu2"] = "swiglu"
    """Feed-forward nonlinearity: swiglu is gated; relu2 is the squared ReLU."""
    n_experts: int = 0
    """Experts per layer; 0 = a dense feed-forward."""
    experts_per_token: int = 2
    """Experts each token visits; 1 = Switch routing."""
    n_shared_experts: int = 0
    """Experts that every token visits besides, as one dense feed-forward of that many times d_ff."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become expert weights."""
    normalize_experts: bool = True
    """Rescale the chosen experts' weights to sum to 1; for Switch (one expert) they are never rescaled."""
    balance_loss: float = 0.01
    """Weight of the load-balancing loss that keeps experts equally busy."""
    router_z_loss: float = 0.001
    """Weight of the loss that keeps router logits small."""
    qk_norm: bool = False
    """RMS-normalize each query and key head before rotation."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head too."""
    rope_theta: float = 1e4
    """Base of the rotary wavelengths."""
    rope_scaling: dict[str, Any] | None = None
    """Longer contexts than trained for: {"rope_type": "linear"|"ntk"|"dynamic"|"yarn"|"llama3", "factor": …, …}."""
    sliding_window: int | None = None
    """Each token sees itself and this many less one before it; None = everything before it."""
    attention_softcap: float | None = None
    """Squash attention scores into ±cap by cap·tanh(score/cap)."""
    logit_softcap: float | None = None
    """Squash output logits the same way."""
    bias: bool = False
    """Biases in every linear layer and LayerNorm."""
    qkv_bias: bool | None = None
    """Biases of the query/key/value projection alone (Qwen2); None = as `bias`."""
    dropout: float = 0.0
    """In training, the probability of dropping an element of the embeddings and of what each sublayer adds to the
    stream. Attention's weights are never dropped: fused attention holds no table of them."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_kv_heads", "head_dim", "d_ff", "sliding_window"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1 or None, not {value}")
        for field in dataclasses.fields(self):
            choices = _CHOICES.get(field.name)
            value = getattr(self, field.name)
            _require(choices is None or value in choices, f"{field.name} must be one of {choices}, not {value!r}")
        _require(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"n_heads={self.n_heads} does not divide d_model={self.d_model}: choose a divisor, or set head_dim",
        )
        _require(
            self.n_heads % self.kv_heads == 0,
            f"n_kv_heads={self.kv_heads} does not divide n_heads={self.n_heads}: each key head serves equally many",
        )
        _require(
            self.position != "rope" or self.head_size % 2 == 0,
            f"position='rope' rotates pairs, so the head size must be even, not {self.head_size}",
        )
        _require(
            self.position != "sinusoidal" or self.d_model % 2 == 0,
            f"position='sinusoidal' needs an even d_model, not {self.d_model}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), not {self.dropout}")
        _require(self.n_experts >= 0, f"n_experts must not be negative, not {self.n_experts}")
        _require(
            not self.n_experts or 1 <= self.experts_per_token <= self.n_experts,
            f"experts_per_token must be between 1 and n_experts={self.n_experts}, not {self.experts_per_token}",
        )
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            _require(kind in ROPE_TYPES, f"rope_scaling['rope_type'] must be one of {(*ROPE_TYPES,)}, not {kind!r}")
            for name in ROPE_TYPES[kind]:
                value = self.rope_scaling.get(name)
                fits = isinstance(value, (int, float)) and value > 0
                _require(fits, f"rope_scaling[{name!r}] of {kind} must be a number above 0, not {value!r}")

    # Names for what is left at None.

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def ff_size(self) -> int:
        if self.d_ff:
            return self.d_ff
        wide = 8 * self.d_model / 3 if self.ffn == "swiglu" else 4 * self.d_model
        return max(64, -(-int(wide) // 64) * 64)  # rounded up to what matrix units like

    @property
    def gated(self) -> bool:
        return self.ffn == "swiglu"

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    # Sizes, by arithmetic: no tensor is made.

    def parameter_count(self, *, active: bool = False, embeddings: bool = True) -> int:
        """Parameters of the model; `active`: only those one token uses; `embeddings=False`: without lookup tables.

        The head counts as a matrix product whether or not it shares the embedding's table.
        """
        c = self
        norm = {"rmsnorm": c.d_model, "layernorm": c.d_model * (2 if c.bias else 1), "none": 0}[c.norm]
        heads = (c.n_heads + 2 * c.kv_heads) * c.head_size
        attention = c.d_model * heads + (heads if c.has_qkv_bias else 0)
        attention += c.n_heads * c.head_size * c.d_model + (c.d_model if c.bias else 0)
        attention += 2 * c.head_size if c.qk_norm else 0
        layer = 2 * norm + attention + self._ffn_parameters(active)
        table, head = c.vocab_size * c.d_model, c.vocab_size * c.d_model
        positions = c.max_seq_len * c.d_model if c.position == "learned" else 0
        lookups = (0 if c.tie_embeddings else table) + positions
        return c.n_layers * layer + norm + head + (lookups if embeddings else 0)

    def _ffn_parameters(self, active: bool) -> int:
        inner = self.ff_size * (2 if self.gated else 1)

        def dense(copies: int) -> int:
            weights = self.d_model * inner * copies + self.ff_size * copies * self.d_model
            return weights + (inner * copies + self.d_model if self.bias else 0)

        if not self.n_experts:
            return dense(1)
        expert = 3 * self.d_model * self.ff_size
        visited = self.experts_per_token if active else self.n_experts
        shared = dense(self.n_shared_experts) if self.n_shared_experts else 0
        return self.d_model * self.n_experts + visited * expert + shared

    def flops_per_token(self, sequence: int | None = None, *, training: bool = True) -> float:
        """Matrix FLOPs a token costs: 6 N + 12 L H D T in training, a third of it forward only."""
        length = min(sequence or self.max_seq_len, self.sliding_window or self.max_seq_len)
        weights = 6 * self.parameter_count(active=True, embeddings=False)
        scores = 12 * self.n_layers * self.n_heads * self.head_size * length
        return (weights + scores) * (1.0 if training else 1 / 3)

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Cache a generated token occupies over all layers."""
        return 2 * self.n_layers * self.kv_heads * self.head_size * element_size

    # Presets and files.

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A known shape by name, with any field replaced: `ModelConfig.preset("llama-tiny", vocab_size=8192)`."""
        if name not in PRESETS:
            raise InputError(f"preset {name!r} is not known; choose one of: {', '.join(sorted(PRESETS))}")
        return cls(**{**PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        known = sorted(field.name for field in dataclasses.fields(cls))
        unknown = sorted(set(values) - set(known))
        _require(
            not unknown, f"ModelConfig has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}"
        )
        return cls(**values)


_CHOICES = {
    "norm": ("rmsnorm", "layernorm", "none"),
    "position": ("rope", "learned", "sinusoidal", "none"),
    "ffn": ("swiglu", "gelu", "relu", "relu2"),
    "router": ("softmax", "sigmoid"),
}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
