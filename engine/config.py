"""`ModelConfig`: every architectural choice of a model, in one dataclass.

A language model here is data: `ModelConfig` names every choice on the road from GPT-2 (LayerNorm, learned positions,
GELU, biases) to Llama (RMSNorm, RoPE, SwiGLU, grouped queries), Qwen3 (QK-norm) and Mixtral (sparse experts). One
`Transformer` reads it; nothing else in the house asks "which model is this?". What a published family needs beyond
that (interleaved rotations, packed matrices, norms that lack 1) is a change of variables in `formats/family.py`.

This file imports no torch, so that the command line can show every field as a flag in a blink.
"""

from __future__ import annotations

import dataclasses
import typing
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
        max_seq_len=40_960, rope_theta=1e6, qk_norm="head",
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
    "longrope": (ORIGINAL,),
}
GATED = ("swiglu", "geglu", "clamped_swiglu")


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
    """Hidden width of the feed-forward (of one expert, when sparse); None = 4 d, or 8/3 d where it is gated."""
    max_seq_len: int = 512
    """Longest sequence the model accepts."""
    layers: str = ""
    """Attention pattern, a letter a layer, repeated over the depth: w = sliding window, f = full attention, n = full
    attention without RoPE (NoPE). Empty: all w where there is a sliding_window, else all f."""
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    """Normalization of sublayers and before the head."""
    norm_eps: float = 1e-6
    """Added to the variance inside a norm."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Place of the norms: before each sublayer (pre-norm), on its output (OLMo-2), or both (Gemma-2)."""
    residual: Literal["serial", "parallel", "shared"] = "serial"
    """Residual connection: serial = feed-forward after attention; parallel = both read the same stream, with two norms
    (GPT-NeoX); shared = with one norm (GPT-J)."""
    embedding_scale: float = 1.0
    """Factor on the embeddings (Gemma: the root of d_model)."""
    residual_scale: float = 1.0
    """Factor on what each sublayer adds to the stream (Granite)."""
    logit_scale: float = 1.0
    """Factor on the logits (Cohere), applied to the hidden states before the head."""
    attention_scale: float | None = None
    """Factor on attention scores; None = 1 / sqrt(head_dim)."""
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """Position encoding."""
    ffn: Literal["swiglu", "geglu", "clamped_swiglu", "gelu", "gelu_erf", "relu", "relu2"] = "swiglu"
    """Feed-forward nonlinearity. Gated: swiglu, geglu (GELU by tanh), clamped_swiglu (gpt-oss). Plain: gelu (by tanh),
    gelu_erf (exact), relu, relu2 (squared)."""
    n_experts: int = 0
    """Experts per layer; 0 = a dense feed-forward."""
    experts_per_token: int = 2
    """Top-k: experts a token is routed to; 1 = Switch routing."""
    n_dense_layers: int = 0
    """The first so many layers have no experts (DeepSeek)."""
    dense_ff: int | None = None
    """Hidden width of those layers; None = d_ff."""
    shared_ff: int = 0
    """Hidden width of the shared expert, which every token uses; 0 = none."""
    shared_gate: bool = False
    """Multiply the shared expert's output by its own sigmoid gate (Qwen2-MoE)."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Function from router logits to expert weights."""
    router_bias: bool = False
    """A bias in the router (gpt-oss)."""
    choice_bias: bool = False
    """A learned bias on the choice of experts, not on their weights (DeepSeek-V3's auxiliary-loss-free balancing): in
    training its gradient is the load error."""
    expert_groups: int = 1
    """Group-limited routing: groups of experts; a token's experts come from the best `groups_used` of them."""
    groups_used: int = 1
    """See `expert_groups`. A group is as good as its best expert; with `choice_bias`, as its best two together."""
    expert_bias: bool = False
    """Biases in the experts (gpt-oss)."""
    normalize_experts: bool = True
    """Rescale the chosen experts' weights to sum to 1; for Switch (one expert) they are never rescaled."""
    expert_scale: float = 1.0
    """Factor on the weighted sum of the chosen experts (DeepSeek's routed_scaling_factor)."""
    balance_loss: float = 0.01
    """Weight of the router's load-balancing loss."""
    router_z_loss: float = 0.001
    """Weight of the router's z-loss, which keeps its logits small."""
    qk_norm: Literal["none", "head", "whole", "after"] = "none"
    """RMSNorm of queries and keys: head = each head before RoPE (Qwen3), whole = all heads as one vector (OLMo-2),
    after = each head after RoPE (Hunyuan). True means head."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head too."""
    rope_theta: float = 1e4
    """RoPE base (theta)."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling for longer contexts: {"rope_type": "linear"|"ntk"|"dynamic"|"yarn"|"llama3"|"longrope", …}."""
    local_rope: dict[str, Any] | None = None
    """RoPE of sliding-window layers, where it differs: {"rope_theta": …} and what `rope_scaling` may hold (Gemma 3)."""
    query_growth: dict[str, float] | None = None
    """{"beta": …, "length": …}: queries are multiplied by 1 + beta ln(1 + ⌊position / length⌋) (Ministral 3)."""
    rotary_dim: int | None = None
    """Partial RoPE: the first columns of a head that rotate; None = all."""
    kv_rank: int = 0
    """Rank of the KV latent, from which keys and values are up-projected (MLA, DeepSeek); 0 = plain attention."""
    q_rank: int = 0
    """Rank of the query latent of MLA; 0 = queries are projected directly."""
    rope_dim: int = 0
    """With `kv_rank`: rotary columns of a head, whose key all heads share."""
    value_dim: int = 0
    """With `kv_rank`: width of a head's values."""
    attention_sinks: bool = False
    """Attention sinks: a learned logit a head that joins the softmax but has no value (gpt-oss)."""
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included; None = all before it."""
    attention_softcap: float | None = None
    """Squash attention scores into ±cap by cap·tanh(score/cap)."""
    logit_softcap: float | None = None
    """Squash output logits the same way."""
    bias: bool = False
    """Biases in every linear layer but the head, and in every LayerNorm."""
    qkv_bias: bool | None = None
    """Biases of the query/key/value projection alone (Qwen2); None = as `bias`."""
    output_bias: bool | None = None
    """Biases of attention's output projection alone; None = as `bias`."""
    ffn_bias: bool | None = None
    """Biases of the feed-forward alone; None = as `bias`."""
    norm_weight: bool = True
    """Norms have a learned weight; False = layernorm without parameters (OLMo)."""
    norm_bias: bool | None = None
    """Biases of LayerNorms alone; None = as `bias`."""
    head_bias: bool = False
    """A bias in the output head (Phi-2)."""
    dropout: float = 0.0
    """In training, the probability of dropping an element of the embeddings and of what each sublayer adds to the
    stream. Attention's weights are never dropped: fused attention holds no table of them."""

    def __post_init__(self) -> None:
        if isinstance(self.qk_norm, bool):  # older files
            object.__setattr__(self, "qk_norm", "head" if self.qk_norm else "none")
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "expert_groups", "groups_used"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_kv_heads", "head_dim", "d_ff", "dense_ff", "sliding_window", "rotary_dim"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1 or None, not {value}")
        for name in ("n_experts", "n_dense_layers", "shared_ff", "kv_rank", "q_rank", "rope_dim", "value_dim"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {choices}, not {value!r}")
        _require(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"n_heads={self.n_heads} does not divide d_model={self.d_model}: choose a divisor, or set head_dim",
        )
        _require(
            self.n_heads % self.kv_heads == 0,
            f"n_kv_heads={self.kv_heads} does not divide n_heads={self.n_heads}: each key head serves equally many",
        )
        _require(
            self.position != "sinusoidal" or self.d_model % 2 == 0,
            f"position='sinusoidal' needs an even d_model, not {self.d_model}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), not {self.dropout}")
        _require(
            not (self.head_bias and self.tie_embeddings), "head_bias=True needs tie_embeddings=False: a head of its own"
        )
        _require(
            self.norm_weight or (self.norm == "layernorm" and not self.has_bias("norm")),
            f"norm_weight=False needs norm='layernorm' and norm_bias=False, not {self.norm!r} and {self.norm_bias}",
        )
        self._check_layers()
        self._check_rotation()
        self._check_experts()

    def _check_layers(self) -> None:
        strange = set(self.layers) - set("wfn")
        _require(not strange, f"layers={self.layers!r} must consist of the letters w, f and n")
        _require(
            "w" not in self.layers or self.sliding_window is not None,
            f"layers={self.layers!r} names windows (w), but sliding_window is None",
        )

    def _check_rotation(self) -> None:
        if self.kv_rank:
            _require(self.rope_dim >= 1, f"kv_rank={self.kv_rank} needs rope_dim of at least 1, not {self.rope_dim}")
            _require(
                1 <= self.value_dim <= self.head_size,
                f"value_dim must be between 1 and head_dim={self.head_size}, not {self.value_dim}",
            )
            _require(not self.attention_sinks, "kv_rank is not implemented together with attention_sinks")
            _require(self.kv_heads == self.n_heads, f"kv_rank needs n_kv_heads=n_heads, not {self.kv_heads}")
            _require(
                self.qk_norm == "none", f"kv_rank has norms of its own: qk_norm must be 'none', not {self.qk_norm!r}"
            )
        if self.position == "rope":
            size, name = self.rotary_size, "head size" if self.rotary_size == self.head_size else "rotating part"
            _require(size % 2 == 0, f"position='rope' rotates pairs, so the {name} must be even, not {size}")
            _require(size <= self.head_size, f"{size} columns rotate, but a head has {self.head_size}")
        growth = self.query_growth
        _require(
            growth is None or (sorted(growth) == ["beta", "length"] and growth["length"] > 0),
            f"query_growth must be None or {{'beta': …, 'length': …}}, a length above 0, not {growth!r}",
        )
        for name in ("rope_scaling", "local_rope"):
            scaling = getattr(self, name)
            if scaling is None:
                continue
            kind = scaling.get("rope_type", "default" if name == "local_rope" else None)
            _require(kind in ROPE_TYPES, f"{name}['rope_type'] must be one of {(*ROPE_TYPES,)}, not {kind!r}")
            for number in ROPE_TYPES[kind]:
                value = scaling.get(number)
                fits = isinstance(value, (int, float)) and value > 0
                _require(fits, f"{name}[{number!r}] of {kind} must be a number above 0, not {value!r}")

    def _check_experts(self) -> None:
        if not self.n_experts:
            return
        _require(
            1 <= self.experts_per_token <= self.n_experts,
            f"experts_per_token must be between 1 and n_experts={self.n_experts}, not {self.experts_per_token}",
        )
        groups, used = self.expert_groups, self.groups_used
        _require(
            self.n_experts % groups == 0 and used <= groups,
            f"expert_groups={groups} must divide n_experts={self.n_experts} and be at least groups_used={used}",
        )
        _require(
            self.n_experts // groups * used >= self.experts_per_token,
            f"experts_per_token={self.experts_per_token} do not fit in groups_used={used} of expert_groups={groups}",
        )

    # Names for what is left at None.

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rotary_size(self) -> int:
        """Head dimensions that RoPE rotates."""
        return self.rope_dim if self.kv_rank else self.rotary_dim or self.head_size

    @property
    def score_scale(self) -> float:
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def ff_size(self) -> int:
        return self.d_ff or default_width(self.d_model, self.ffn)

    @property
    def gated(self) -> bool:
        return self.ffn in GATED

    def has_bias(self, part: Literal["qkv", "output", "ffn", "norm"]) -> bool:
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    # Layers by number.

    def kind(self, layer: int) -> str:
        """Attention kind of a layer as a letter: w (sliding window), f (full), n (full, without RoPE)."""
        letters = self.layers or ("w" if self.sliding_window else "f")
        return letters[layer % len(letters)]

    @property
    def kinds(self) -> str:
        return "".join(map(self.kind, range(self.n_layers)))

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.kind(layer) == "w" else None

    def rope(self, kind: str) -> tuple[float, dict[str, Any] | None] | None:
        """RoPE base and scaling of layers of this kind; None where RoPE is not applied."""
        if self.position != "rope" or kind == "n":
            return None
        if kind == "f" or self.local_rope is None:
            return self.rope_theta, self.rope_scaling
        scaling = dict(self.local_rope)
        theta = scaling.pop("rope_theta", self.rope_theta)
        return theta, scaling if scaling.get("rope_type", "default") != "default" else None

    def sparse(self, layer: int) -> bool:
        return self.n_experts > 0 and layer >= self.n_dense_layers

    def ff_width(self, layer: int) -> int:
        """Hidden width of the dense feed-forward of a layer."""
        return self.dense_ff or self.ff_size if self.n_experts and layer < self.n_dense_layers else self.ff_size

    # Sizes, by arithmetic: no tensor is made.

    def parameter_count(self, *, active: bool = False, embeddings: bool = True) -> int:
        """Parameters of the model; `active`: only those one token uses; `embeddings=False`: without lookup tables.

        The head counts as a matrix product whether or not it shares the embedding's table.
        """
        c = self
        learned = {"rmsnorm": 1, "layernorm": c.norm_weight + c.has_bias("norm"), "none": 0}[c.norm]
        norm = learned * c.d_model
        before = 1 if c.residual == "shared" else 2
        norms = {"before": before, "after": 2, "both": before + 2}[c.norm_place]
        layers = c.n_layers * (norms * norm + self._attention_parameters())
        layers += sum(self._ffn_parameters(layer, active) for layer in range(c.n_layers))
        table, head = c.vocab_size * c.d_model, c.vocab_size * c.d_model + (c.vocab_size if c.head_bias else 0)
        positions = c.max_seq_len * c.d_model if c.position == "learned" else 0
        lookups = (0 if c.tie_embeddings else table) + positions
        return layers + norm + head + (lookups if embeddings else 0)

    def _attention_parameters(self) -> int:
        c, inner = self, self.n_heads * self.head_size
        sinks = c.n_heads if c.attention_sinks else 0

        def linear(inputs: int, outputs: int, bias: bool = False) -> int:
            return inputs * outputs + (outputs if bias else 0)

        if c.kv_rank:
            queries = linear(c.q_rank or c.d_model, inner)
            queries += linear(c.d_model, c.q_rank, c.has_bias("qkv")) + c.q_rank if c.q_rank else 0
            latent = linear(c.d_model, c.kv_rank + c.rope_dim, c.has_bias("qkv")) + c.kv_rank
            heads = linear(c.kv_rank, c.n_heads * (c.head_size - c.rope_dim + c.value_dim))
            return queries + latent + heads + linear(c.n_heads * c.value_dim, c.d_model, c.has_bias("output"))
        keys = c.kv_heads * c.head_size
        norms = {"none": 0, "whole": inner + keys}.get(c.qk_norm, 2 * c.head_size)
        heads = linear(c.d_model, inner + 2 * keys, c.has_bias("qkv"))
        return heads + linear(inner, c.d_model, c.has_bias("output")) + norms + sinks

    def _ffn_parameters(self, layer: int, active: bool) -> int:
        c, inner = self, 2 if self.gated else 1

        def dense(width: int) -> int:
            biases = inner * width + c.d_model if c.has_bias("ffn") else 0
            return c.d_model * inner * width + width * c.d_model + biases if width else 0

        if not c.sparse(layer):
            return dense(c.ff_width(layer))
        expert = 3 * c.d_model * c.ff_size + (2 * c.ff_size + c.d_model if c.expert_bias else 0)
        router = c.d_model * c.n_experts + c.n_experts * (c.router_bias + c.choice_bias)
        shared = dense(c.shared_ff) + (c.d_model if c.shared_ff and c.shared_gate else 0)
        return router + (c.experts_per_token if active else c.n_experts) * expert + shared

    def flops_per_token(self, sequence: int | None = None, *, training: bool = True) -> float:
        """Matrix FLOPs a token costs: 6 N + 12 L H D T in training, a third of it forward only."""
        length = sequence or self.max_seq_len
        seen = sum(min(length, self.window(layer) or self.max_seq_len) for layer in range(self.n_layers))
        weights = 6 * self.parameter_count(active=True, embeddings=False)
        scores = 12 * self.n_heads * self.head_size * seen
        return (weights + scores) * (1.0 if training else 1 / 3)

    def kv_bytes_per_token(self, element_size: int = 2, latent: bool = False) -> int:
        """Cache a generated token occupies over all layers; `latent`: of what latent attention makes keys and values
        from."""
        numbers = self.kv_rank + self.rope_dim if latent else 2 * self.kv_heads * self.head_size
        return self.n_layers * numbers * element_size

    # Presets and files.

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Return a named preset with fields replaced: `ModelConfig.preset("llama-tiny", vocab_size=8192)`."""
        if name not in PRESETS:
            raise InputError(f"preset {name!r} is not known; choose one of: {', '.join(sorted(PRESETS))}")
        return cls(**{**PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        values = current_names(values)
        known = sorted(field.name for field in dataclasses.fields(cls))
        unknown = sorted(set(values) - set(known))
        _require(
            not unknown, f"ModelConfig has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}"
        )
        return cls(**values)


def default_width(d_model: int, ffn: str) -> int:
    """Default hidden width of the feed-forward: about as many parameters with a gate as without."""
    wide = 8 * d_model / 3 if ffn in GATED else 4 * d_model
    return max(64, -(-int(wide) // 64) * 64)  # rounded up to what matrix units like


def current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Rename fields of a configuration written by an earlier version to their current names."""
    values = dict(values)
    if count := values.pop("n_shared_experts", 0):
        width = values.get("d_ff") or default_width(values.get("d_model", 512), values.get("ffn", "swiglu"))
        values["shared_ff"] = count * width
    return values


def choices_of(config: type) -> dict[str, tuple[str, ...]]:
    """The allowed values of each `Literal` field of a dataclass."""
    hints = typing.get_type_hints(config).items()
    return {name: typing.get_args(kind) for name, kind in hints if typing.get_origin(kind) is Literal}


_CHOICES = choices_of(ModelConfig)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
