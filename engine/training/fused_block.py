"""Fused forward and backward of a Transformer block for CPU training: `Block.forward` in 4–9 % less time a step.

An executor (`executors.py`): tiles of 64 tokens go through norm, projection and rotation, and later through the output
projection and the feed-forward, without leaving the cache (kernels/cpu/fused_block.py). `install` puts it into a model
that is about to be trained. Where it cannot run (no gradient is wanted, autocast, bfloat16 on another CPU than AMD's),
`Block.forward` does.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...kernels.cpu import fused_block, gemm
from ..config import ModelConfig
from ..executors import OUTSIDE, ROUTING, SCALED, SHAPE, WINDOWS, Supported
from ..model import Attend, Attention, Block, Linear, RMSNorm, Rotation, SwiGLU, Transformer

LEAST_ROWS = 64  # for fewer, a weight is not worth packing


def _whole_vectors(c: ModelConfig) -> bool:
    widths = c.d_model, c.ff_size, c.n_heads * c.head_size, (c.n_heads + 2 * c.kv_heads) * c.head_size
    return not any(width % fused_block.GRAIN for width in widths)


is_supported = Supported(
    computed=(*SHAPE, *OUTSIDE, *SCALED, *ROUTING, *WINDOWS, "norm_eps", "norm_bias", "attention_sinks", "qk_norm"),
    only={"norm": ("rmsnorm",), "ffn": ("swiglu",), "n_experts": (0,), "dropout": (0.0,)}
    | {"bias": (False,)}
    | dict.fromkeys(("qkv_bias", "output_bias", "ffn_bias"), (None, False)),
    where=_whole_vectors,
)


class FusedBlock(Block):
    """`Block` whose training pass is two C++ calls around attention."""

    def forward(self, stream_BTC, delta_BTC, rotate, attend):
        weights = fusible_weights(self, stream_BTC)
        if weights is None:
            return super().forward(stream_BTC, delta_BTC, rotate, attend)
        return *fused_forward(self, weights, stream_BTC, delta_BTC, rotate, attend), None


class GemmLinear(Linear):
    """`Linear` by our own GEMM where PyTorch's is slower; in float32 on AMD a step of GPT-2 is 1.8 times as fast."""

    def forward(self, x):
        operands = (self.weight,) if self.bias is None else (self.weight, self.bias)
        few = x.numel() < LEAST_ROWS * x.shape[-1]
        if few or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not gemm.fits(x, *operands):
            return super().forward(x)
        return gemm.linear(x, self.weight, self.bias)


def install(model: Transformer) -> None:
    """Replace the blocks of a supported model by fused ones; in others, linear layers where our GEMM is faster."""
    fusible = fused_block.HAS_FUSED_BLOCK and is_supported(model.config)
    for block in model.blocks:
        if fusible and _is_plain(block):
            block.__class__ = FusedBlock
        elif gemm.is_fast(torch.float32):
            for part in block.modules():
                if type(part) is Linear:
                    part.__class__ = GemmLinear


def _is_plain(block: Block) -> bool:
    """Return whether no part of the block was replaced, by tensor parallelism or by hand."""
    norms, linears = (block.attention_norm, block.ffn_norm), (block.attention.qkv, block.attention.output)
    if (type(block), type(block.attention), type(block.ffn)) != (Block, Attention, SwiGLU):
        return False
    linears += block.ffn.gate_up, block.ffn.down
    return all(type(x) is Linear for x in linears) and all(type(x) is RMSNorm for x in norms)


def fusible_weights(block: FusedBlock, stream_BTC: Tensor) -> list[Tensor] | None:
    """Weights of a block if this call can be fused (training, on a CPU, in a dtype with fast products), else None."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    attention, ffn = block.attention, block.ffn
    parts = block.attention_norm, block.ffn_norm, attention.qkv, attention.output, ffn.gate_up, ffn.down
    weights = [part.weight for part in parts]
    return weights if fused_block.is_supported(stream_BTC, *weights) else None


def fused_forward(
    block: FusedBlock, weights: list[Tensor], stream_BTC: Tensor, delta_BTC: Tensor, rotate: Rotation, attend: Attend
) -> tuple[Tensor, Tensor]:
    """Fused `Block.forward`: (stream, delta) after the block."""
    before, between, qkv, output, gate_up, down = weights
    attention = cast("Attention", block.attention)
    normed = attention.qk_norm != "none"  # stands between projection and rotation, or behind
    where = (None, None, None) if normed else (rotate.cos, rotate.sin, rotate.positions)
    heads, eps = attention.heads[:2], block.attention_norm.eps
    q_BTHD, k_BTKD, v_BTKD, stream_BTC = fused_block.norm_qkv_rope(
        delta_BTC, stream_BTC, before, eps, qkv, heads, *where
    )
    if normed:
        q_BTHD, k_BTKD = attention.turned(q_BTHD, k_BTKD, rotate)
    gathered_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, attention)
    eps = block.ffn_norm.eps
    delta_BTC, stream_BTC = fused_block.out_proj_mlp(gathered_BTHD, stream_BTC, output, between, eps, gate_up, down)
    return stream_BTC, delta_BTC
