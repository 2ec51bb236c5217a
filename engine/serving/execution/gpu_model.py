"""GPU executors: batch-invariant linear layers, and blocks with few launches (fused norms, RoPE, KV-cache writes).

A step that makes one token for each of a few sequences is hundreds of small launches, and each costs microseconds
however little it does. Between the QKV projection and attention there would be four: two QK norms, RoPE, the write into
the KV cache. `PagedAttention` is `Attention` with one.

`BatchInvariantLinear` is `Linear` by `kernels.linear` (batch invariance): a library's product would sum in another
order when the batch grows. `GatedLinear` is `SwiGLU` whose gate is part of the product before it, and `FusedBlock` is
`Block` whose norms are fused into the products around them, packed ones too: six launches a layer.

The resulting model shares its weights with the original, and is a `Transformer` in everything else.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .... import kernels
from ....kernels.linear import arrival_counters
from ....kernels.packed_linear import TURNED
from ....kernels.swiglu import ACTIVATIONS
from ...config import ModelConfig
from ...executors import BIASES, LATENT, OUTSIDE, ROUTING, SCALED, SHAPE, STREAM, WINDOWS, Supported
from ...formats.packed_weight import PackedLinear
from ...layers import RMSNorm, SwiGLU
from ...model import Attention, Block, LatentAttention, Linear, Transformer
from .kv_cache import KernelAttention

MakeLinear = Callable[[Tensor, Tensor | None, str], nn.Module]


class BatchInvariantLinear(nn.Module):
    """Batch-invariant linear layer: a row's bits do not depend on the other rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.arrivals = arrival_counters(weight)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, arrivals=self.arrivals)


def batch_invariant_linear(weight: Tensor, bias: Tensor | None, path: str) -> nn.Module:
    return BatchInvariantLinear(weight, bias)


class ScaledStream(NamedTuple):
    """Residual stream times the next norm's weight; the next product divides by the RMS (`square_sums`)."""

    scaled: Tensor
    square_sums: Tensor
    eps: float


def apply_linear(layer: Any, x: Tensor | ScaledStream, activation: str = "") -> Tensor:
    """Apply a linear layer, gated if `activation` is given, to a tensor or a stream whose norm is fused into it."""
    if not isinstance(x, ScaledStream):
        return kernels.linear_swiglu(x, layer.weight, layer.bias, activation) if activation else layer(x)
    if type(layer) is PackedLinear:
        weight = layer.packed.segments[0].tensor
        return kernels.packed_normed_linear(x.scaled, x.square_sums, weight, layer.bias, x.eps, activation)
    own = layer.weight, layer.bias, x.eps, activation
    return kernels.normed_linear(x.scaled, x.square_sums, *own, arrivals=layer.arrivals)


def residual_add(layer: Any, x: Tensor, stream: Tensor, norm: Any) -> ScaledStream:
    """Fused residual add: stream += layer(x), in place, with the next norm's inputs prepared."""
    if type(layer) is PackedLinear:
        weight = layer.packed.segments[0].tensor
        joined = kernels.packed_linear_residual(x, weight, stream, norm.weight, layer.bias)
    else:
        joined = kernels.linear_residual(x, layer.weight, stream, norm.weight, layer.bias, arrivals=layer.arrivals)
    return ScaledStream(*joined, norm.eps)


def takes_norms(layer: Any) -> bool:
    """Return whether a norm can be fused into a linear layer: one float weight, or one packed segment whose rotated
    columns are a multiple of 64."""
    if type(layer) is not PackedLinear:
        return type(layer) is BatchInvariantLinear
    segment, *more = layer.packed.segments
    return not more and not (segment.layout.rotate and layer.packed.columns % TURNED)


class GatedLinear(SwiGLU):
    """`SwiGLU` with the gate fused into the first product, unless an adapter has replaced that product."""

    def forward(self, x: Tensor | ScaledStream) -> Tensor:
        return self.down(self.gated(x))

    def gated(self, x: Tensor | ScaledStream) -> Tensor:
        """Everything before the down projection."""
        if type(self.gate_up) is BatchInvariantLinear or isinstance(x, ScaledStream):
            return apply_linear(self.gate_up, x, self.activation)
        return kernels.swiglu_packed(self.gate_up(x), self.activation)  # an adapter changes gate_up


class PagedAttention(nn.Module):
    """`Attention` with one launch for QK norm, RoPE (by its own tables, not `rotate`) and the KV-cache write."""

    is_supported = Supported(  # attention alone is replaced
        computed={*SHAPE, *OUTSIDE, *SCALED, *STREAM, *WINDOWS, *ROUTING, *BIASES}
        | {"rotary_dim", "ffn", "n_experts", "attention_sinks"},
        only={"qk_norm": ("none", "head")},
    )

    def __init__(self, attention: Attention, tables: tuple[Tensor, Tensor]):
        super().__init__()
        self.index, self.heads, self.head_size = attention.index, attention.heads, attention.head_size
        self.window, self.softcap, self.scale = attention.window, attention.softcap, attention.scale
        self.qkv, self.output, self.sinks = attention.qkv, attention.output, attention.sinks
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.tables = tables

    def forward(self, x_1TC: Tensor, rotate: Callable, attend: KernelAttention) -> Tensor:
        """As `Attention.forward`, for the concatenated tokens of a step."""
        return self.output(self.gathered(x_1TC, attend))

    def gathered(self, x_1TC: Tensor | ScaledStream, attend: KernelAttention) -> Tensor:
        """Everything before the output projection."""
        q_THD, k_TKD, v_TKD = (
            apply_linear(self.qkv, x_1TC)[0].unflatten(-1, (-1, self.head_size)).split(self.heads, dim=-2)
        )
        norms = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        q_THD = kernels.qk_norm_rope_write(
            q_THD, k_TKD, v_TKD, *norms, *self.tables, attend.positions, *attend.pages(self), attend.slots,
            eps=1e-6 if self.q_norm is None else self.q_norm.eps, **attend.scales(self),
        )  # fmt: skip
        return attend.attend_pages(q_THD, self).flatten(-2)[None]


class PagedLatentAttention(LatentAttention):
    """MLA over pages of latents, with absorbed projections (DeepSeek-V2): full keys and values are never materialized.

    `k_up` and `v_up` are each head's key and value up-projections: queries are mapped into the latents' space by the
    one, results mapped back by the other. They are not quantized when other products are."""

    is_supported = Supported(
        computed={*SHAPE, *OUTSIDE, *SCALED, *STREAM, *WINDOWS, *ROUTING, *BIASES, *LATENT} | {"ffn", "n_experts"},
        where=lambda config: config.kv_rank > 0,
    )
    k_up: Tensor  # (heads, kv_rank, still columns)
    v_up: Tensor  # (heads, value_dim, kv_rank)

    @classmethod
    def install(cls, attention: Any, original: Any, dtype: torch.dtype) -> None:
        """Convert a copied `LatentAttention` in place; `kv_up` is taken from the original, before quantization."""
        kv_up = original.kv_up.packed.dequantize() if type(original.kv_up) is PackedLinear else original.kv_up.weight
        H, D, V, (L, R) = attention.heads[0], attention.head_size, attention.value_dim, attention.latent
        keys_HSL, values_HVL = kv_up.detach().to(dtype).view(H, D - R + V, L).split((D - R, V), 1)
        attention.__class__ = cls
        attention.k_up, attention.v_up = keys_HSL.transpose(1, 2), values_HVL

    def forward(self, x_1TC: Tensor, rotate: Callable, attend: Any) -> Tensor:
        R = self.latent[1]
        q_1THD, (latent_1TL, turning_1T1R) = self.queries(x_1TC), self.latents(x_1TC)
        q_1THR, k_1T1R = rotate(q_1THD[..., :R], turning_1T1R)
        attend.write(latent_1TL[0].unsqueeze(1), k_1T1R[0], self)
        q_THL = kernels.head_linear(q_1THD[0, ..., R:], self.k_up)
        if attend.store.scales:  # pages of 8 bits hold latents rotated
            q_THL = kernels.hadamard(q_THL, back=True)
        means_THL = attend.attend_latents(q_THL, q_1THR[0], self)
        if attend.store.scales:
            means_THL = kernels.hadamard(means_THL, back=True)
        return self.output(kernels.head_linear(means_THL, self.v_up).flatten(-2)[None])


def keeps_latents(config: ModelConfig, device: torch.device, adapters: object = None) -> bool:
    """Return whether a model's pages hold latents; not with adapters, whose layers the absorbed form would skip."""
    return device.type == "cuda" and adapters is None and PagedLatentAttention.is_supported(config)


class FusedBlock(Block):
    """`Block` with norms fused into the products around them, as installed by `fused_model`.

    `next_norm` is the first norm of the next block if that is fused too; it then receives a `ScaledStream`."""

    is_supported = Supported(
        computed=(
            *SHAPE,
            *OUTSIDE,
            *SCALED,
            *WINDOWS,
            *ROUTING,
            *BIASES,
            "norm_eps",
            "rotary_dim",
            "ffn",
            "n_experts",
            "attention_sinks",
        ),
        only={"qk_norm": ("none", "head"), "norm": ("rmsnorm",), "dropout": (0.0,)},
    )
    next_norm: RMSNorm | None = None

    def forward(self, stream, delta: Any, rotate, attend) -> Any:
        attention: Any = self.attention
        ffn: Any = self.ffn
        normed = delta
        if not isinstance(delta, ScaledStream):
            normed, stream = self.attention_norm.add(delta, stream)
        normed = residual_add(attention.output, attention.gathered(normed, attend), stream, self.ffn_norm)
        if self.next_norm is None:
            return stream, ffn(normed), None
        return stream, residual_add(ffn.down, ffn.gated(normed), stream, self.next_norm), None


def fuse_norms(model: Transformer) -> None:
    """Fuse the norms of all blocks whose products support it."""
    behind: Any = None
    block: Any
    for block in reversed(model.blocks):
        if not _takes_norms(block):
            behind = None
            continue
        block.__class__, block.__dict__["next_norm"] = FusedBlock, behind  # not registered as a submodule
        behind = block.attention_norm


def _takes_norms(block: Any) -> bool:
    if type(block.attention) is not PagedAttention or type(block.ffn) is not GatedLinear:
        return False
    if block.ffn_norm.weight.dtype == torch.float16:  # a scaled stream might overflow
        return False
    return all(map(takes_norms, (block.attention.qkv, block.attention.output, block.ffn.gate_up, block.ffn.down)))


def fused_model(
    model: Transformer, make_linear: MakeLinear | None, norms: bool = True, latent: bool = False
) -> Transformer:
    """Executor of a model on the same weights; `make_linear` replaces float linear layers, if given. Without `norms`,
    norms stay separate launches, for layers that are replaced afterwards. `latent`: pages hold latents."""
    twin = shallow_copy(model)
    if make_linear is not None:
        replace_linear(twin.blocks, make_linear)
        for layer in twin.blocks.modules():
            if type(layer) is SwiGLU and layer.activation in ACTIVATIONS:
                layer.__class__ = GatedLinear
    if PagedAttention.is_supported(model.config):
        for block in twin.blocks:
            rotation = model.rotation(block.kind)
            if rotation.cos is not None:
                block.attention = PagedAttention(block.attention, (rotation.cos, rotation.sin))
    for block, own in zip(twin.blocks, model.blocks) if latent else ():
        PagedLatentAttention.install(block.attention, own.attention, model.embedding.weight.dtype)
    if norms and FusedBlock.is_supported(model.config):
        fuse_norms(twin)
    return twin


def shallow_copy(model: Transformer) -> Transformer:
    """Copy of a model on the same weights, whose layers can be replaced."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    shared = {id(tensor): tensor for tensor in model.parameters()}
    twin.blocks = copy.deepcopy(model.blocks, shared)
    return twin


def replace_linear(module: nn.Module, make: MakeLinear) -> None:
    """Replace every float linear layer inside by `make(weight, bias, path)`."""
    for path, layer in [(path, layer) for path, layer in module.named_modules() if type(layer) is Linear]:
        module.set_submodule(path, make(layer.weight, layer.bias, path))


def replace(module: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace every module of exactly this class inside by `make(module)`."""
    for name, child in module.named_children():
        if type(child) is kind:  # a subclass computes something else
            setattr(module, name, make(child))
        else:
            replace(child, kind, make)
