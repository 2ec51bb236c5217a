"""Token-wise layers of a `Transformer`: linear layers, norms, feed-forwards, mixtures of experts.

B batch, T time, C width of the stream (d_model), F feed-forward width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from .config import ModelConfig


class Linear(nn.Module):
    """Linear layer y = x Wᵀ + b, with W stored (out, in) as published checkpoints do."""

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
    """Embedding table: one learned vector a row, y = W[i]."""

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
    """RMSNorm: scale each vector to unit root mean square, then by a learned weight per feature."""

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
        """Fused residual add and norm: (normalized sum, the sum itself), one pass over memory instead of two."""
        return kernels.add_rms_norm(delta, stream, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm: subtract each vector's mean, divide by its standard deviation, then scale and shift per feature."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True, weight: bool = True) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.register_parameter("weight", nn.Parameter(torch.empty(width)) if weight else None)
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.shape, self.eps = (width,), eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def add(self, delta: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + delta
        return self(stream), stream


class NoNorm(nn.Module):
    """Identity in place of a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add(self, delta: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + delta
        return stream, stream


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, config.norm_eps, config.has_bias("norm"), config.norm_weight)
    return NoNorm()


class SwiGLU(nn.Module):
    """Gated feed-forward: down(f(gate(x)) * up(x)); f is SiLU (SwiGLU), GELU (GeGLU) or what `ffn` says."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width, bias = width or config.ff_size, config.has_bias("ffn")
        self.activation = gate_of(config)
        self.gate_up = Linear(config.d_model, 2 * width, bias)
        self.down = Linear(width, config.d_model, bias, std=output_std(width, config))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(kernels.swiglu_packed(self.gate_up(x_BTC), self.activation))


class FeedForward(nn.Module):
    """Feed-forward without a gate (the original Transformer's): down(f(up(x))) with f = GELU, ReLU or squared ReLU."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width, bias = width or config.ff_size, config.has_bias("ffn")
        self.activation = ACTIVATIONS[config.ffn]
        self.up = Linear(config.d_model, width, bias)
        self.down = Linear(width, config.d_model, bias, std=output_std(width, config))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTC)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "gelu_erf": F.gelu,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def gate_of(config: ModelConfig) -> str:
    """Activation of the gate, by the kernels' name; experts are always gated."""
    return {"swiglu": "silu", "geglu": "gelu", "clamped_swiglu": "clamped"}.get(config.ffn, config.ffn)


def make_feed_forward(config: ModelConfig, width: int | None = None) -> nn.Module:
    return SwiGLU(config, width) if config.gated else FeedForward(config, width)


class MoE(nn.Module):
    """Mixture of experts (MoE): a router sends each token to its top-k feed-forwards and sums them by its weights.

    Parameters grow with the number of experts, cost per token only with how many it visits. Two losses regularize
    the router: load balance, and the z-loss, which keeps its logits small. With one expert a token this is the Switch
    Transformer. Experts are always gated; `ffn` names the activation of the gate.
    """

    product: Callable[..., tuple[Tensor, kernels.MoEAux]] | None = None
    """Replacement of `kernels.moe` where experts are packed (quantized)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.router = Linear(c.d_model, c.n_experts, c.router_bias)
        self.w_gate_up = nn.Parameter(torch.empty(c.n_experts, 2 * c.ff_size, c.d_model))
        self.w_down = nn.Parameter(torch.empty(c.n_experts, c.d_model, c.ff_size))
        self.b_gate_up = nn.Parameter(torch.empty(c.n_experts, 2 * c.ff_size)) if c.expert_bias else None
        self.b_down = nn.Parameter(torch.empty(c.n_experts, c.d_model)) if c.expert_bias else None
        self.choice_bias = nn.Parameter(torch.empty(c.n_experts)) if c.choice_bias else None
        self.shared = make_feed_forward(c, c.shared_ff) if c.shared_ff else None
        self.shared_gate = Linear(c.d_model, 1) if c.shared_ff and c.shared_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self.w_gate_up, self.config.d_model**-0.5)
        draw(self.w_down, output_std(self.config.ff_size, self.config))
        for bias in (self.b_gate_up, self.b_down, self.choice_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, kernels.MoEAux]:
        y_BTC, routing = self.experts(x_BTC, self.router(x_BTC))
        return self.with_shared(y_BTC, x_BTC), routing

    def experts(self, x: Tensor, logits: Tensor, **options: Any) -> tuple[Tensor, kernels.MoEAux]:
        """Route tokens to experts."""
        return (self.product or kernels.moe)(
            x, logits, self.w_gate_up, self.w_down, self.config.experts_per_token,
            **routing_options(self.config), **self.biases(), **options,
        )  # fmt: skip

    def biases(self) -> dict[str, Tensor]:
        """Optional tensors of routers and experts, by the kernels' names."""
        own = {"choice_bias": self.choice_bias, "b_gate_up": self.b_gate_up, "b_down": self.b_down}
        return {name: bias for name, bias in own.items() if bias is not None}

    def with_shared(self, y_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """Add the shared expert's output to the scaled sum of the routed experts."""
        y_BTC = y_BTC * self.config.expert_scale if self.config.expert_scale != 1 else y_BTC
        if self.shared is None:
            return y_BTC
        shared_BTC = self.shared(x_BTC)
        return y_BTC + (shared_BTC if self.shared_gate is None else self.shared_gate(x_BTC).sigmoid() * shared_BTC)


def routing_options(config: ModelConfig) -> dict[str, Any]:
    """Routing options: how a router's logits become experts and weights, by the kernels' names."""
    c = config
    options = {"score": c.router, "normalize": c.normalize_experts and c.experts_per_token > 1}
    if c.expert_groups > 1:
        options["groups"] = (c.expert_groups, c.groups_used)
    return options | {"activation": gate_of(c)}


def draw(weight: Tensor, std: float) -> None:
    """Initialize a weight with normal noise; no-op on the meta device, where `normal_` would import the compiler."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def output_std(inputs: int, config: ModelConfig) -> float:
    """Initial standard deviation of projections into the stream: 1/√(2 L), so that 2 L of them sum to unit scale."""
    return inputs**-0.5 / math.sqrt(2 * config.n_layers)
