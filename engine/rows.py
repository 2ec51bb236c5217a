"""A layer's short cut through training on a CPU: its rows in tiles (kernels/rows_cpu.py), where they know the layer.

It computes what `Block.forward` says op by op, which is the text to read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import rows_cpu

if TYPE_CHECKING:
    from .model import Attend, Block, Rotation


def weights_of(block: Block, stream_BTC: Tensor, rotate: Rotation) -> list[Tensor] | None:
    """What the tiles need of a layer that is being trained, if they know all that is in it."""
    if not rows_cpu.HAS_ROWS or torch.compiler.is_compiling() or not torch.is_grad_enabled() or block.dropout:
        return None
    from .model import Attention, Linear, RMSNorm, Rotation, SwiGLU

    attention, ffn, norms = block.attention, block.ffn, (block.attention_norm, block.ffn_norm)
    if type(attention) is not Attention or type(ffn) is not SwiGLU or type(rotate) is not Rotation or attention.q_norm:
        return None
    linears = attention.qkv, attention.output, ffn.gate_up, ffn.down
    if not all(type(x) is Linear and x.bias is None for x in linears) or not all(type(x) is RMSNorm for x in norms):
        return None
    weights = [part.weight for part in (*norms, *linears)]
    return weights if rows_cpu.serves(stream_BTC, *weights) else None


def run(
    block: Block, weights: list[Tensor], stream_BTC: Tensor, delta_BTC: Tensor, rotate: Rotation, attend: Attend
) -> tuple[Tensor, Tensor]:
    """(stream, delta) after the layer."""
    before, between, qkv, output, gate_up, down = weights
    where = rotate.cos, rotate.sin, rotate.positions
    heads, eps = block.attention.heads[:2], block.attention_norm.eps
    q_BTHD, k_BTKD, v_BTKD, stream_BTC = rows_cpu.to_heads(delta_BTC, stream_BTC, before, eps, qkv, heads, *where)
    gathered_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, block.attention)
    eps = block.ffn_norm.eps
    delta_BTC, stream_BTC = rows_cpu.from_heads(gathered_BTHD, stream_BTC, output, between, eps, gate_up, down)
    return stream_BTC, delta_BTC
