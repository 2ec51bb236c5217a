"""Attention maps: the attention weights of every layer and head, for plotting.

Fused attention never holds these weights, so they are recomputed here by the plain formula, from the same queries and
keys: the model hands them to whatever `attend` it is given.

B batch, T asking tokens, S answering tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .model import Attention, Transformer


@torch.no_grad()
def attention_maps(model: Transformer, tokens: list[int]) -> list[Tensor]:
    """Attention weights of every layer, `(head, query position, key position)`; each row sums to 1."""
    maps = []

    def attend(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer: Attention) -> Tensor:
        groups = q_BTHD.shape[2] // k_BTKD.shape[2]
        k_BTHD, v_BTHD = (x.repeat_interleave(groups, dim=2).float() for x in (k_BTKD, v_BTKD))
        scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD.float(), k_BTHD) * layer.scale
        if layer.softcap:
            scores_BHTS = layer.softcap * torch.tanh(scores_BHTS / layer.softcap)
        here = torch.arange(scores_BHTS.shape[-1], device=scores_BHTS.device)
        distance_TS = here[:, None] - here[None, :]
        hidden_TS = (distance_TS < 0) | (distance_TS >= (layer.window or math.inf))
        weights_BHTS = scores_BHTS.masked_fill(hidden_TS, -torch.inf).softmax(-1)
        maps.append(weights_BHTS[0].cpu())
        return torch.einsum("bhts,bshd->bthd", weights_BHTS, v_BTHD).to(q_BTHD.dtype)

    model.hidden(torch.tensor([tokens], device=model.device), attend=attend)
    return maps
