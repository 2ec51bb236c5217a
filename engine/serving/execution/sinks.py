"""Attention sinks (gpt-oss) over pages, on a CPU: plain attention, scaled by what the sink leaves of its softmax.

The kernels do not say what their softmax divided by. So each sequence's keys are read once more, and its scores are
summed in PyTorch (`kernels/attention_sinks.py` tells why that is enough).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....kernels.attention_sinks import log_sums

if TYPE_CHECKING:
    from .kv_cache import AttentionMetadata, PagedKVCache


class SinkAttend:
    """Another `attend`, and the sinks of the layers that ask it."""

    def __init__(self, attend: Callable[..., Tensor], store: PagedKVCache, layout: AttentionMetadata) -> None:
        self.attend, self.store, self.layout = attend, store, layout

    def __call__(self, q_1THD: Tensor, k_1TKD: Tensor, v_1TKD: Tensor, layer) -> Tensor:
        gathered_1THD = self.attend(q_1THD, k_1TKD, v_1TKD, layer)
        share_THD = torch.zeros_like(gathered_1THD[0])
        keys = self.store.keys[layer.index]
        starts, contexts = self.layout.starts.tolist(), self.layout.contexts.tolist()
        for table, start, end, context in zip(self.layout.tables, starts, starts[1:], contexts):
            pages = torch.from_numpy(table[: -(-context // self.store.page_size)]).long()
            k_1SKD = keys[pages].flatten(0, 1)[:context].to(q_1THD.dtype)[None]
            sums_1TH = log_sums(q_1THD[:, start:end], k_1SKD, layer.window, layer.softcap, layer.scale)
            share_THD[start:end] = torch.sigmoid(sums_1TH[0] - layer.sinks).unsqueeze(-1).to(share_THD.dtype)
        return gathered_1THD * share_THD
