"""The one Transformer: the same code trains, prefills and decodes.

A language model reads tokens and predicts the next one. It keeps one vector a token, the *residual stream*. Each block
adds two things to it: what attention gathers from earlier tokens, and what a feed-forward computes from the token
alone. A norm before each keeps the numbers at unit scale; a last norm and a head turn the stream into logits.

Three ideas make this one file enough for every architecture and every way of running it:

- **An architecture is data.** `ModelConfig` decides which norm, which positions, which feed-forward; the classes below
  hold no more than that choice.
- **Attention is asked, not owned.** A block computes queries, keys and values and hands them to `attend(q, k, v,
  layer)`. Training passes dense causal attention; serving passes one that writes keys and values into pages and reads
  them back; `KVCache` below is the smallest such memory. The model itself knows no cache.
- **The stream and what is about to join it travel apart.** A block returns `(stream, delta)`; the next norm adds and
  normalizes in one pass (`add_rms_norm`), which on a GPU halves the traffic of both.

B batch, T time, C width of the stream (d_model), H query heads, K key/value heads, D head size, F feed-forward width,
E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from .config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor, "Attention"], Tensor]


class Linear(nn.Module):
    """y = x Wᵀ + b, with W stored (out, in) as the world's checkpoints do."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.std = inputs**-0.5 if std is None else std  # unit-scale inputs give unit-scale outputs
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table with one learned vector a row: y = W[i]."""

    def __init__(self, rows: int, width: int, std: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.std = std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self.weight, self.std)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class RMSNorm(nn.Module):
    """Scale each vector to unit root-mean-square, then by a learned weight per feature."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, delta: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized sum, and the sum itself: one pass over memory instead of two."""
        return kernels.add_rms_norm(delta, stream, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Subtract each vector's mean, divide by its standard deviation, then scale and shift per feature."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, delta: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + delta
        return self(stream), stream


class NoNorm(nn.Module):
    """The absence of a norm, to see what norms are for."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add(self, delta: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + delta
        return stream, stream


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, config.norm_eps, config.bias)
    return NoNorm()


class Attention(nn.Module):
    """Queries ask, keys answer, values travel: every token gathers from itself and the tokens before it.

    With fewer key/value heads than query heads (GQA), each group of query heads shares one. One product makes q, k and
    v together; `attend` does the gathering.
    """

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        c, size = config, config.head_size
        self.index = index
        self.heads = (c.n_heads, c.kv_heads, c.kv_heads)
        self.head_size = size
        self.window = c.sliding_window
        self.softcap = c.attention_softcap
        self.scale = size**-0.5
        self.qkv = Linear(c.d_model, sum(self.heads) * size, c.has_qkv_bias)
        self.output = Linear(c.n_heads * size, c.d_model, c.bias, std=_output_std(c.n_heads * size, c))
        self.q_norm = RMSNorm(size, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(size, c.norm_eps) if c.qk_norm else None

    def forward(
        self, x_BTC: Tensor, rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], attend: Attend
    ) -> Tensor:
        heads = self.qkv(x_BTC).unflatten(-1, (-1, self.head_size))
        q_BTHD, k_BTKD, v_BTKD = heads.split(self.heads, dim=-2)
        if self.q_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        q_BTHD, k_BTKD = rotate(q_BTHD, k_BTKD)
        gathered_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, self)
        return self.output(gathered_BTHD.flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one half decides how much of the other half passes."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or config.ff_size
        self.gate_up = Linear(config.d_model, 2 * width, config.bias)
        self.down = Linear(width, config.d_model, config.bias, std=_output_std(width, config))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(kernels.swiglu_packed(self.gate_up(x_BTC)))


class FeedForward(nn.Module):
    """down(f(up(x))) with f = GELU, ReLU or squared ReLU: the Transformer's original feed-forward."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or config.ff_size
        self.activation = ACTIVATIONS[config.ffn]
        self.up = Linear(config.d_model, width, config.bias)
        self.down = Linear(width, config.d_model, config.bias, std=_output_std(width, config))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTC)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def make_feed_forward(config: ModelConfig, width: int | None = None) -> nn.Module:
    return SwiGLU(config, width) if config.gated else FeedForward(config, width)


class MoE(nn.Module):
    """A router sends each token to a few of many small feed-forwards, and their answers are blended by its weights.

    Parameters grow with the number of experts, cost per token only with how many it visits. Two losses keep the router
    honest: one rewards equal load, one keeps its logits small. With one expert a token this is the Switch Transformer.
    Experts are always gated: `ffn` names the function of their gate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.router = Linear(c.d_model, c.n_experts)
        self.w_gate_up = nn.Parameter(torch.empty(c.n_experts, 2 * c.ff_size, c.d_model))
        self.w_down = nn.Parameter(torch.empty(c.n_experts, c.d_model, c.ff_size))
        self.shared = make_feed_forward(c, c.ff_size * c.n_shared_experts) if c.n_shared_experts else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self.w_gate_up, self.config.d_model**-0.5)
        draw(self.w_down, _output_std(self.config.ff_size, self.config))

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, kernels.MoEAux]:
        c = self.config
        y_BTC, routing = kernels.moe(
            x_BTC, self.router(x_BTC), self.w_gate_up, self.w_down, c.experts_per_token,
            score=c.router, normalize=c.normalize_experts and c.experts_per_token > 1,
            activation="silu" if c.ffn == "swiglu" else c.ffn,
        )  # fmt: skip
        return (y_BTC if self.shared is None else y_BTC + self.shared(x_BTC)), routing


@dataclass(frozen=True)
class Rotation:
    """How queries and keys learn where they are: turned by the rows of two tables, or as they are without."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    positions: Tensor | None = None

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        if self.cos is None:
            return q_BTHD, k_BTKD
        return kernels.rope(q_BTHD, k_BTKD, self.cos, self.sin, self.positions)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each reading the normalized stream and adding to it."""

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, index)
        self.ffn_norm = make_norm(config)
        self.ffn = MoE(config) if config.n_experts else make_feed_forward(config)
        self.dropout = config.dropout

    def forward(self, stream, delta, rotate, attend):
        """(stream, what is about to join it) → the same after this layer, and the routing of its experts if any."""
        normed, stream = self.attention_norm.add(delta, stream)
        delta = self.drop(self.attention(normed, rotate, attend))
        normed, stream = self.ffn_norm.add(delta, stream)
        delta, routing = self.ffn(normed) if isinstance(self.ffn, MoE) else (self.ffn(normed), None)
        return stream, self.drop(delta), routing

    def drop(self, delta: Tensor) -> Tensor:
        return F.dropout(delta, self.dropout, self.training) if self.dropout else delta


@dataclass(frozen=True)
class Losses:
    """What a training step minimizes, in parts: the trainer shows them apart and descends on their `total`."""

    cross_entropy: Tensor
    balance: Tensor | None = None
    router_z: Tensor | None = None
    expert_load: Tensor | None = None  # (layers, experts): how many tokens each expert received
    total: Tensor | None = None


class Transformer(nn.Module):
    """Tokens in, logits out; everything else about it is in `config`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        std = c.d_model**-0.5 if c.tie_embeddings else 1.0  # a tied table must also make unit-scale logits
        self.embedding = Embedding(c.vocab_size, c.d_model, std)
        self.positions = Embedding(c.max_seq_len, c.d_model, std) if c.position == "learned" else None
        self.blocks = nn.ModuleList(Block(c, index) for index in range(c.n_layers))
        self.norm = make_norm(c)
        self.head = None if c.tie_embeddings else Linear(c.d_model, c.vocab_size)
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def init_weights(self) -> Transformer:
        """Draw fresh weights, for a model built on the meta device and moved by `to_empty`."""

        def reset(module: nn.Module) -> None:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

        return self.apply(reset)  # parts before the whole, as they were constructed

    def forward(self, tokens_BT: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        return self.logits(self.hidden(tokens_BT, positions, attend))

    def hidden(self, tokens_BT: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """The normalized stream after the last block: everything but the head."""
        return self._run(tokens_BT, positions, attend)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        logits = hidden @ self.head_weight.T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, **options) -> Tensor:
        """Mean cross-entropy of the next token, plus what experts need to stay balanced."""
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
        """The loss in parts. Targets of -100 do not count. The full logits are never held in memory.

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
            return Losses(entropy, total=entropy)
        balance = torch.stack([routing.load_balance for routing in routings]).mean()
        router_z = torch.stack([routing.z for routing in routings]).mean()
        load = torch.stack([routing.tokens_per_expert for routing in routings])
        total = entropy + c.balance_loss * balance + c.router_z_loss * router_z
        return Losses(entropy, balance, router_z, load, total)

    def log_probs(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        attend: Attend | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The log-probability of each target, with gradient; 0 for targets of -100."""
        hidden = self._run(tokens_BT, positions, attend)[0]
        losses = self.cross_entropy(hidden.flatten(0, -2), targets_BT.flatten(), reduction="none")
        return -losses.view(targets_BT.shape)

    def cross_entropy(self, hidden_NC: Tensor, targets_N: Tensor, **options) -> Tensor:
        """The head and its loss in one."""
        return kernels.linear_cross_entropy(
            hidden_NC, self.head_weight, targets_N, softcap=self.config.logit_softcap, **options
        )

    def _run(self, tokens_BT: Tensor, positions: Tensor | None, attend: Attend | None):
        if positions is None:
            self._check_length(tokens_BT.shape[-1])
        stream, rotate = self._embed(tokens_BT, positions)
        delta, routings = torch.zeros_like(stream), []
        for block in self.blocks:
            stream, delta, routing = block(stream, delta, rotate, attend or dense_attention)
            if routing is not None:
                routings.append(routing)
        return self.norm.add(delta, stream)[0], routings

    def _check_length(self, length: int) -> None:
        limit = self.config.max_seq_len
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's max_seq_len={limit}")

    def _embed(self, tokens_BT: Tensor, positions: Tensor | None):
        """The stream's start, and how this architecture rotates queries and keys."""
        c, stream = self.config, self.embedding(tokens_BT)
        if c.position == "rope":
            cos, sin = self._table(
                lambda: kernels.rope_tables(c.head_size, c.max_seq_len, c.rope_theta, c.rope_scaling)
            )
            return stream, Rotation(cos, sin, positions)
        if c.position != "none":
            if c.position == "learned":
                table = self.positions.weight
            else:
                (table,) = self._table(lambda: (sinusoids(c.max_seq_len, c.d_model) * self.embedding.std,))
            where = table[: tokens_BT.shape[-1]] if positions is None else F.embedding(positions, table)
            stream = stream + where.to(stream.dtype)
        if self.training and c.dropout:
            stream = F.dropout(stream, c.dropout)
        return stream, Rotation()

    def _table(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Position tables are made once a device, not stored: a checkpoint holds only what was learned."""
        if self.device not in self._tables:
            with torch.device("cpu"), torch.inference_mode(False):  # so that they outlive the context that asked first
                self._tables[self.device] = tuple(table.to(self.device) for table in make())
        return self._tables[self.device]


def dense_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer: Attention) -> Tensor:
    """Training's `attend`: every token sees all tokens before it in its row."""
    return kernels.attention(q_BTHD, k_BTKD, v_BTKD, window=layer.window, softcap=layer.softcap, scale=layer.scale)


def draw(weight: Tensor, std: float) -> None:
    """Fresh normal weights where there is memory: on the meta device, `normal_` would import the whole compiler."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def sinusoids(length: int, width: int) -> Tensor:
    """Fixed position vectors: sines and cosines whose wavelengths grow from 2π to 10000·2π across the features."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def _output_std(inputs: int, config: ModelConfig) -> float:
    """2 L contributions join the stream; each starts 1/√(2 L) small, so that their sum has unit scale at any depth."""
    return inputs**-0.5 / math.sqrt(2 * config.n_layers)
