"""Exact, data-free outlier smoothing before quantization to 8 bits (SmoothQuant's idea).

Numbers in 8 bits share scales: an activation or a weight with the other 63 of its group, a key or value with its
head. Trained models have channels that are fifty times larger than the rest, and beside one of them the others keep
two bits of eight. But many a channel can be rescaled without changing what the layer computes: it is divided by some s
where it is produced, and the weights that read it are multiplied by s:

    gains of a norm  →  columns of the products that follow
    values           →  columns of the output product
    features         →  columns of the down product, in a gated layer, which is linear in them
    keys             →  queries; two channels that a rotation turns together have one s

Rounding happens in groups of 64 columns that are rotated first (csrc/cpu/serving/hadamard.hpp), which evens out by
itself what differs by a factor of two or so. So only an s of at least four is used: a real model (SmolLM2-135M) loses
0.0026 nats (KL) with these, 0.0027 with none and 0.0030 with all of them; channels 64 times larger than the rest cost
six times the loss with none.

No data is needed: the magnitude of a channel is estimated from the weights that produce it. Where both sides are
rounded, the scale is split between them, s = √(magnitude / largest weight that reads it); keys are made equal, for
queries have 16 bits. A small norm weight stays small: it may compensate a channel that is large by itself. Each s is a
power of two, so nothing is rounded on the way, and the layer gives the very same bits as before.

E experts, F features, C width of the stream, H query heads, K key heads, D head dim.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...executors import BIASES, OUTSIDE, ROUTING, SCALED, SHAPE, STREAM, WINDOWS, Supported
from ...model import Attention, Block, MoE

OUTLIER = 8  # times the usual size of a head's keys: a bias like that is too large for the rest to share 8 bits with

is_supported = Supported(
    computed={*SHAPE, *OUTSIDE, *SCALED, *WINDOWS, *ROUTING, *BIASES, *STREAM, "n_experts"}
    - {"norm_place", "residual", "expert_bias"},
    only={"ffn": ("swiglu", "geglu", "gelu", "gelu_erf", "relu", "relu2"), "qk_norm": ("none", "head")},
)


@torch.no_grad()
def smoothed(block: Block, config: ModelConfig) -> Block:
    """Copy of a block with outliers smoothed, if its configuration is supported; else the block itself."""
    if not is_supported(config):
        return block
    block = copy.deepcopy(block)
    ffn, readers, features = block.ffn, [], []
    if isinstance(ffn, MoE):
        readers, features = [ffn.router.weight, ffn.w_gate_up], [(ffn.w_gate_up, ffn.w_down)]
        readers += [] if ffn.shared_gate is None else [ffn.shared_gate.weight]
        ffn = ffn.shared
    if ffn is not None:
        first = ffn.gate_up if config.gated else ffn.up
        readers.append(first.weight)
        features += [(first.weight, ffn.down.weight)] if config.gated and first.bias is None else []
    _smooth_gain(block.attention_norm, [block.attention.qkv.weight])
    _smooth_gain(block.ffn_norm, readers)
    _smooth_heads(block.attention, block.attention_norm, config.position == "rope")
    for gate_up, down in features:
        _smooth_features(gate_up, down, block.ffn_norm)
    return block


def has_outlier_key_biases(block: Block) -> bool:
    """Return whether key biases dwarf the keys' magnitude, so that 8-bit keys would lose too much (Qwen2)."""
    attention = block.attention
    if attention.qkv.bias is None or attention.k_norm is not None:
        return False
    (H, K, _), D = attention.heads, attention.head_size
    keys = slice(H * D, (H + K) * D)
    said_KD = _sizes(attention.qkv.weight[keys], block.attention_norm).unflatten(0, (K, D))
    bias_KD = attention.qkv.bias[keys].float().abs().unflatten(0, (K, D))
    return bool((bias_KD.amax(-1) > OUTLIER * said_KD.square().mean(-1).sqrt()).any())


def _smooth_gain(norm: nn.Module, readers: Sequence[Tensor]) -> None:
    if not hasattr(norm, "weight"):
        return
    parts = [part for part in (norm.weight, getattr(norm, "bias", None)) if part is not None]
    made_C = torch.stack([part.float().square() for part in parts]).sum(0).sqrt()
    read_C = torch.stack([weight.abs().flatten(0, -2).amax(0).float() for weight in readers]).amax(0)
    s_C = _shares(made_C, read_C)
    s_C = _round_to_pow2((s_C / s_C.median()).clamp(min=1))
    for part in parts:
        _scale(part, 1 / s_C)
    for weight in readers:
        _scale(weight, s_C)


def _smooth_heads(attention: Attention, norm: nn.Module, rotary: bool) -> None:
    (H, K, _), D, qkv = attention.heads, attention.head_size, attention.qkv
    size_nD = _sizes(qkv.weight, norm)
    if qkv.bias is not None:
        size_nD = torch.hypot(size_nD, qkv.bias.float())
    size_nD = size_nD.unflatten(0, (-1, D))
    output_CKGD = attention.output.weight.unflatten(1, (K, H // K, D))
    value_KD = _round_to_pow2(_relative(_shares(size_nD[H + K :], output_CKGD.abs().amax((0, 2)).float())))
    _scale(output_CKGD, value_KD[:, None])

    normed = attention.k_norm is not None
    key_KD = attention.k_norm.weight.float().abs()[None] if normed else size_nD[H : H + K]
    if rotary:
        key_KD = key_KD.unflatten(-1, (2, -1)).square().mean(-2).sqrt().repeat(1, 2)
    key_KD = _round_to_pow2(_relative(_floored(key_KD)))
    if normed:
        _scale(attention.k_norm.weight, 1 / key_KD[0])
        _scale(attention.q_norm.weight, key_KD[0])
        key_KD = torch.ones_like(value_KD)
    s_N = torch.cat([key_KD.repeat_interleave(H // K, 0), 1 / key_KD, 1 / value_KD]).flatten()
    _scale(qkv.weight, s_N[:, None])
    if qkv.bias is not None:
        _scale(qkv.bias, s_N)


def _smooth_features(gate_up: Tensor, down: Tensor, norm: nn.Module) -> None:
    """Smooth the features of gated feed-forwards, also of stacked experts: (E, 2 F, C) and (E, C, F)."""
    gate_F, up_F = _sizes(gate_up, norm).chunk(2, -1)
    s_F = _round_to_pow2(_relative(_shares(gate_F * up_F, down.abs().amax(-2).float())))
    _scale(down, s_F.unsqueeze(-2))
    _scale(gate_up.chunk(2, -2)[1], 1 / s_F.unsqueeze(-1))


def _sizes(weight: Tensor, norm: nn.Module) -> Tensor:
    """Estimate the RMS of a product's outputs behind a norm."""
    gain_C = getattr(norm, "weight", weight.new_ones(weight.shape[-1]))
    return (weight.float().square() @ gain_C.float().square()).sqrt()


def _shares(made: Tensor, read: Tensor) -> Tensor:
    return (_floored(made) / _floored(read)).sqrt()


def _relative(s: Tensor) -> Tensor:
    """Normalize to a geometric mean of one."""
    return s / s.log().mean(-1, keepdim=True).exp()


def _floored(x: Tensor) -> Tensor:
    """Clamp from below, so that near-zero channels are not blown up."""
    return x.clamp(min=1e-3 * x.max().clamp(min=1e-30))


def _round_to_pow2(s: Tensor) -> Tensor:
    """Round to powers of two; factors below four become one, as the Hadamard rotation suffices there."""
    exponent = s.log2().round()
    return torch.where(exponent.abs() >= 2, exponent, 0).exp2()


def _scale(x: Tensor, s: Tensor) -> None:
    x *= s.to(x.dtype)
