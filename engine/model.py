"""The Transformer: one implementation for training, prefill and decoding.

A language model reads tokens and predicts the next one. It keeps one vector a token, the *residual stream*. Each block
adds two things to it: what attention gathers from earlier tokens, and what a feed-forward computes from the token
alone. A norm before each keeps the numbers at unit scale; a last norm and a head turn the stream into logits.

Three ideas make this one file enough for every architecture and every way of running it:

- **An architecture is data.** `ModelConfig` decides which norm, which positions, which feed-forward; the classes here
  and in `layers.py` hold no more than that choice.
- **Attention is passed in.** A block computes queries, keys and values and hands them to `attend(q, k, v,
  layer)`. Training passes dense causal attention; serving passes one that writes keys and values into pages and reads
  them back; `generation.KVCache` is the smallest such cache. The model itself knows none.
- **The residual addition is fused into the next norm.** A block returns `(stream, delta)`, the stream and what is still
  to be added; the next norm adds and normalizes in one pass (`add_rms_norm`), which on a GPU halves their traffic.

B batch, T time, C width of the stream (d_model), H query heads, K key/value heads, D head size, F feed-forward width,
E experts, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from .config import ModelConfig
from .layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    MoE,
    NoNorm,
    RMSNorm,
    SwiGLU,
    draw,
    make_feed_forward,
    make_norm,
    output_std,
)

__all__ = ["Attention", "Block", "Embedding", "FeedForward", "LatentAttention", "LayerNorm", "Linear", "Losses", "MoE"]
__all__ += ["NoNorm", "RMSNorm", "Rotation", "SwiGLU", "Transformer", "dense_attention", "draw"]

Attend = Callable[[Tensor, Tensor, Tensor, "Attention"], Tensor]
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head causal self-attention (MHA, GQA, MQA).

    With fewer key/value heads than query heads, each group of query heads shares one. One product makes q, k and
    v together; `attend` does the gathering.
    """

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        c, size = config, config.head_size
        self.index = index
        self.heads = (c.n_heads, c.kv_heads, c.kv_heads)
        self.head_size = size
        self.window = c.window(index)
        self.softcap = c.attention_softcap
        self.scale = c.score_scale
        self.qkv = Linear(c.d_model, sum(self.heads) * size, c.has_bias("qkv"))
        self.output = Linear(c.n_heads * size, c.d_model, c.has_bias("output"), std=output_std(c.n_heads * size, c))
        self.qk_norm = c.qk_norm
        widths = (c.n_heads * size, c.kv_heads * size) if c.qk_norm == "whole" else (size, size)
        self.q_norm, self.k_norm = (None if c.qk_norm == "none" else RMSNorm(width, c.norm_eps) for width in widths)
        self.sinks = nn.Parameter(torch.empty(c.n_heads)) if c.attention_sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(self, x_BTC: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        heads = self.qkv(x_BTC).unflatten(-1, (-1, self.head_size))
        q_BTHD, k_BTKD, v_BTKD = heads.split(self.heads, dim=-2)
        q_BTHD, k_BTKD = self.turned(q_BTHD, k_BTKD, rotate)
        gathered_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, self)
        return self.output(gathered_BTHD.flatten(-2))

    def turned(self, q_BTHD: Tensor, k_BTKD: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Queries and keys after QK norm, if configured, and RoPE."""
        if self.qk_norm in ("head", "whole"):
            q_BTHD, k_BTKD = self._normed(q_BTHD, self.q_norm), self._normed(k_BTKD, self.k_norm)
        q_BTHD, k_BTKD = rotate(q_BTHD, k_BTKD)
        if self.qk_norm == "after":
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return q_BTHD, k_BTKD

    def _normed(self, x_BTHD: Tensor, norm: RMSNorm) -> Tensor:
        return norm(x_BTHD.flatten(-2)).view(x_BTHD.shape) if self.qk_norm == "whole" else norm(x_BTHD)


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA, DeepSeek-V2): keys and values are up-projected from one latent a token.

    The first `rope_dim` columns of a head rotate, and their key is the same for all heads. Here the vector is
    up-projected before attention, which is then plain: correct everywhere, at the memory of full keys and values.
    """

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        c, H, D = config, config.n_heads, config.head_size
        self.index = index
        self.heads, self.head_size, self.value_dim = (H, H, H), D, c.value_dim
        self.latent = (c.kv_rank, c.rope_dim)
        self.window = c.window(index)
        self.softcap, self.scale = c.attention_softcap, c.score_scale
        self.q_down = Linear(c.d_model, c.q_rank, c.has_bias("qkv")) if c.q_rank else None
        self.q_norm = RMSNorm(c.q_rank, LATENT_EPS) if c.q_rank else None
        self.q_up = Linear(c.q_rank or c.d_model, H * D)
        self.kv_down = Linear(c.d_model, c.kv_rank + c.rope_dim, c.has_bias("qkv"))
        self.kv_norm = RMSNorm(c.kv_rank, LATENT_EPS)
        self.kv_up = Linear(c.kv_rank, H * (D - c.rope_dim + c.value_dim))
        width = H * c.value_dim
        self.output = Linear(width, c.d_model, c.has_bias("output"), std=output_std(width, c))
        self.sinks = None

    def forward(self, x_BTC: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        H, D, V = self.heads[0], self.head_size, self.value_dim
        q_BTHD, (latent_BTL, turning_BT1R) = self.queries(x_BTC), self.latents(x_BTC)
        still_BTHS, v_BTHV = self.kv_up(latent_BTL).unflatten(-1, (H, -1)).split((D - self.latent[1], V), -1)
        k_BTHD = torch.cat([turning_BT1R.expand(*still_BTHS.shape[:-1], -1), still_BTHS], -1)
        q_BTHD, k_BTHD = rotate(q_BTHD, k_BTHD)
        gathered_BTHD = attend(q_BTHD, k_BTHD, F.pad(v_BTHV, (0, D - V)), self)
        return self.output(gathered_BTHD[..., :V].flatten(-2))

    def queries(self, x_BTC: Tensor) -> Tensor:
        """Queries; the first `rope_dim` columns of each head are the rotary part."""
        asked_BTC = x_BTC if self.q_down is None else self.q_norm(self.q_down(x_BTC))
        return self.q_up(asked_BTC).unflatten(-1, (self.heads[0], self.head_size))

    def latents(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """A token's KV latent, and the rotary part of its key, which all heads share."""
        latent_BTL, turning_BTR = self.kv_down(x_BTC).split(self.latent, dim=-1)
        return self.kv_norm(latent_BTL), turning_BTR.unsqueeze(-2)


LATENT_EPS = 1e-6  # norm epsilon of MLA's latents, whatever norm_eps is: published models hard-code it


@dataclass(frozen=True)
class Rotation:
    """RoPE of queries and keys by tables of cosines and sines; the identity without tables."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    positions: Tensor | None = None
    growth: Tensor | None = None
    """Scale of queries by position (`query_growth`)."""

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        if self.cos is None:
            return q_BTHD, k_BTKD
        if self.growth is not None:
            where = self.growth[: q_BTHD.shape[-3]] if self.positions is None else self.growth[self.positions]
            q_BTHD = q_BTHD * where[..., None, None].to(q_BTHD.dtype)
        return kernels.rope(q_BTHD, k_BTKD, self.cos, self.sin, self.positions)


class Block(nn.Module):
    """Transformer block: attention, then feed-forward, each with norms and a residual connection."""

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        c, before, after = config, config.norm_place != "after", config.norm_place != "before"
        self.kind, self.residual, self.residual_scale = c.kind(index), c.residual, c.residual_scale
        self.attention_norm = make_norm(c) if before else NoNorm()
        self.attention = LatentAttention(c, index) if c.kv_rank else Attention(c, index)
        self.attention_post = make_norm(c) if after else None
        self.ffn_norm = make_norm(c) if before and c.residual != "shared" else NoNorm()
        self.ffn = MoE(c) if c.sparse(index) else make_feed_forward(c, c.ff_width(index))
        self.ffn_post = make_norm(c) if after else None
        self.dropout = c.dropout

    def forward(self, stream, delta, rotate, attend):
        """Run the block: (residual stream, output still to be added to it) → the same two after this block, and routing
        statistics if it has experts."""
        normed, stream = self.attention_norm.add(delta, stream)
        attended = self.joining(self.attention(normed, rotate, attend), self.attention_post)
        if self.residual == "serial":
            normed, stream = self.ffn_norm.add(attended, stream)
        elif self.residual == "parallel":
            normed = self.ffn_norm(stream)
        delta, routing = self.ffn(normed) if isinstance(self.ffn, MoE) else (self.ffn(normed), None)
        delta = self.joining(delta, self.ffn_post)
        return stream, delta if self.residual == "serial" else attended + delta, routing

    def joining(self, delta: Tensor, post: nn.Module | None) -> Tensor:
        """A sublayer's output as it is added to the stream: after post-norm, residual scale and dropout."""
        delta = delta if post is None else post(delta)
        delta = delta if self.residual_scale == 1 else delta * self.residual_scale
        return F.dropout(delta, self.dropout, self.training) if self.dropout else delta


@dataclass(frozen=True)
class Losses:
    """Parts of the training loss: reported one by one; `total` is what backward starts from."""

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor | None = None
    router_z: Tensor | None = None
    expert_load: Tensor | None = None  # (layers, experts): how many tokens each expert received


class Transformer(nn.Module):
    """Decoder-only Transformer: token ids in, logits out. `config` holds every architectural choice."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        std = c.d_model**-0.5 if c.tie_embeddings else 1.0  # a tied table must also make unit-scale logits
        self.embedding = Embedding(c.vocab_size, c.d_model, std)
        self.positions = Embedding(c.max_seq_len, c.d_model, std) if c.position == "learned" else None
        self.blocks = nn.ModuleList(Block(c, index) for index in range(c.n_layers))
        self.norm = make_norm(c)
        self.head = None if c.tie_embeddings else Linear(c.d_model, c.vocab_size, c.head_bias)
        self._tables: dict[tuple[torch.device, str], tuple[Tensor, ...]] = {}

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        return None if self.head is None else self.head.bias

    def init_weights(self) -> Transformer:
        """Draw fresh weights, for a model built on the meta device and moved by `to_empty`."""

        def reset(module: nn.Module) -> None:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

        return self.apply(reset)  # parts before the whole, as they were constructed

    def forward(self, tokens_BT: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        return self.logits(self.hidden(tokens_BT, positions, attend))

    def hidden(self, tokens_BT: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Final hidden states: the stream after the last block and the final norm, times `logit_scale`."""
        return self._run(tokens_BT, positions, attend)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.capped(
            F.linear(hidden, self.head_weight, self.head_bias) if self.config.head_bias else hidden @ self.head_weight.T
        )

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after soft-capping (cap · tanh(logits / cap)), if the model has a cap."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, **options) -> Tensor:
        """Mean next-token cross-entropy plus the auxiliary losses of MoE routers."""
        return self.losses(tokens_BT, targets_BT, **options).total

    def losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        attend: Attend | None = None,
        positions: Tensor | None = None,
        weights_BT: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Losses:
        """The loss in parts. Targets of -100 are ignored. The full logits are never materialized.

        `weights_BT` are factors on the cross-entropy of targets (advantages make it a policy gradient); its mean
        divides by the number of targets that count all the same.
        """
        if tokens_BT.shape != targets_BT.shape:
            raise ValueError(f"targets have shape {tuple(targets_BT.shape)}, tokens {tuple(tokens_BT.shape)}")
        c = self.config
        hidden, routings = self._run(tokens_BT, positions, attend)
        weights = None if weights_BT is None else weights_BT.flatten()
        entropy = self.cross_entropy(
            hidden.flatten(0, -2), targets_BT.flatten(), weights=weights, label_smoothing=label_smoothing, z_loss=z_loss
        )
        if not routings:
            return Losses(entropy, entropy)
        balance = torch.stack([routing.load_balance for routing in routings]).mean()
        router_z = torch.stack([routing.z for routing in routings]).mean()
        load = torch.stack([routing.tokens_per_expert for routing in routings])
        total = entropy + c.balance_loss * balance + c.router_z_loss * router_z
        return Losses(total, entropy, balance, router_z, load)

    def log_probs(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        attend: Attend | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each target, differentiable; 0 for targets of -100."""
        hidden = self._run(tokens_BT, positions, attend)[0]
        losses = self.cross_entropy(hidden.flatten(0, -2), targets_BT.flatten(), reduction="none")
        return -losses.view(targets_BT.shape)

    def cross_entropy(self, hidden_NC: Tensor, targets_N: Tensor, **options) -> Tensor:
        """Fused LM head and cross-entropy."""
        weight_VC = self.head_weight
        if self.head_bias is not None:  # as one more column of the weight, multiplied by a constant 1
            hidden_NC, weight_VC = (
                F.pad(hidden_NC, (0, 1), value=1.0),
                torch.cat([weight_VC, self.head_bias[:, None]], 1),
            )
        return kernels.linear_cross_entropy(
            hidden_NC, weight_VC, targets_N, softcap=self.config.logit_softcap, **options
        )

    def _run(self, tokens_BT: Tensor, positions: Tensor | None, attend: Attend | None):
        if positions is None:
            self._check_length(tokens_BT.shape[-1])
        stream = self._embed(tokens_BT, positions)
        delta, routings = torch.zeros_like(stream), []
        rotate = {kind: self.rotation(kind, positions) for kind in sorted(set(self.config.kinds))}
        for block in self.blocks:
            stream, delta, routing = block(stream, delta, rotate[block.kind], attend or dense_attention)
            if routing is not None:
                routings.append(routing)
        hidden = self.norm.add(delta, stream)[0]
        return (hidden if self.config.logit_scale == 1 else hidden * self.config.logit_scale), routings

    def _check_length(self, length: int) -> None:
        limit = self.config.max_seq_len
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's max_seq_len={limit}")

    def _embed(self, tokens_BT: Tensor, positions: Tensor | None) -> Tensor:
        """Input of the first block: token embeddings, with absolute position embeddings if configured."""
        c, stream = self.config, self.embedding(tokens_BT)
        stream = stream if c.embedding_scale == 1 else stream * c.embedding_scale
        if c.position == "rope":
            return stream
        if c.position != "none":
            if c.position == "learned":
                table = self.positions.weight
            else:
                make = functools.partial(sinusoids, c.max_seq_len, c.d_model)
                (table,) = self._table("sinusoids", lambda: (make() * self.embedding.std,))
            where = table[: tokens_BT.shape[-1]] if positions is None else F.embedding(positions, table)
            stream = stream + where.to(stream.dtype)
        if self.training and c.dropout:
            stream = F.dropout(stream, c.dropout)
        return stream

    def rotation(self, kind: str, positions: Tensor | None = None) -> Rotation:
        """RoPE for layers of this kind at these positions."""
        if self.config.rope(kind) is None:
            return Rotation()
        same = kind == "f" or self.config.local_rope is None
        cos, sin = self._table("f" if same else kind, lambda: rotary_tables(self.config, kind))
        grown = self.config.query_growth
        if grown is None:
            return Rotation(cos, sin, positions)
        (growth,) = self._table("growth", lambda: (growth_table(grown["beta"], grown["length"], len(cos)),))
        return Rotation(cos, sin, positions, growth)

    def _table(self, name: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Position tables are cached per device, not stored: a checkpoint holds only what was learned."""
        key = self.device, name
        if key not in self._tables:
            with torch.device("cpu"), torch.inference_mode(False):  # tables outlive the first caller's context
                self._tables[key] = tuple(table.to(self.device) for table in make())
        return self._tables[key]


def rotary_tables(config: ModelConfig, kind: str) -> tuple[Tensor, Tensor]:
    """RoPE tables (cosines, sines) for layers of this kind; see `kernels.rope_tables`."""
    theta, scaling = config.rope(kind)
    return kernels.rope_tables(config.rotary_size, config.max_seq_len, theta, scaling)


def growth_table(beta: float, length: float, size: int) -> Tensor:
    """Scale of queries by position: 1 + beta · ln(1 + ⌊position / length⌋), as in Llama 4 and Ministral 3."""
    return 1 + beta * torch.log(1 + torch.floor(torch.arange(size) / length))


def dense_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer: Attention) -> Tensor:
    """Default `attend` (training): dense causal attention over each row."""
    options = {"window": layer.window, "softcap": layer.softcap, "scale": layer.scale, "sinks": layer.sinks}
    return kernels.attention(q_BTHD, k_BTKD, v_BTKD, **options)


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal position embeddings: wavelengths grow from 2π to 10000·2π across the features."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
