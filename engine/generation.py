"""Generation with a contiguous KV cache: the smallest decoding loop for a `Transformer`.

Decoding one token needs the keys and values of all tokens before it. Recomputing them would make a text of n tokens
cost n² forward passes of one token; keeping them makes it n. `KVCache` keeps them in one tensor a side, for a batch
whose rows advance together. The paged engine (`serving/`) does the same for rows that come, go and share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import kernels
from .errors import InputError
from .model import Attention, Transformer, dense_attention


class KVCache:
    """Contiguous KV cache with an `attend` that appends to it: `model(tokens, cache.positions(T), cache)`."""

    def __init__(self, model: Transformer, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None):
        c = model.config
        self.limit = c.max_seq_len
        self.capacity = min(capacity or self.limit, self.limit)
        kv_heads = model.blocks[0].attention.heads[1]  # those of this process, where a model is spread over several
        shape = (2, c.n_layers, batch, self.capacity, kv_heads, c.head_size)
        self.keys, self.values = torch.empty(shape, dtype=dtype or model.embedding.weight.dtype, device=model.device)
        self.length = 0

    def positions(self, count: int) -> Tensor:
        """Positions of the next `count` tokens of every row; checks that they fit into the cache."""
        if self.length + count > self.capacity:
            raise InputError(
                f"{self.length} tokens and {count} more do not fit the cache of {self.capacity} "
                f"(the model's max_seq_len is {self.limit})"
            )
        where = torch.arange(self.length, self.length + count, device=self.keys.device)
        return where.expand(self.keys.shape[1], -1)

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer: Attention) -> Tensor:
        start, end = self.length, self.length + k_BTKD.shape[1]
        keys, values = self.keys[layer.index], self.values[layer.index]
        keys[:, start:end] = k_BTKD
        values[:, start:end] = v_BTKD
        if layer.index == len(self.keys) - 1:  # the last layer has seen these tokens: they are now in the past
            self.length = end
        return dense_attention(q_BTHD, keys[:, :end].to(q_BTHD.dtype), values[:, :end].to(q_BTHD.dtype), layer)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """Generate tokens one at a time; a seed gives the same tokens again. Temperature 0 is greedy."""
    if not prompt:
        raise InputError("the prompt is empty: give at least one token to continue from")
    cache = KVCache(model, 1, len(prompt) + max_tokens)
    tokens = torch.tensor([list(prompt)], device=model.device)

    def per_row(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=model.device)

    choice = [per_row(temperature), per_row(top_k, torch.int64), per_row(top_p), per_row(min_p)]
    for _ in range(min(max_tokens, cache.capacity - len(prompt))):
        hidden = model.hidden(tokens, cache.positions(tokens.shape[1]), cache)
        logits = model.logits(hidden[:, -1]).float()
        chosen = kernels.sample(logits, *choice, per_row(seed, torch.int64), per_row(cache.length, torch.int64))
        token = int(chosen)
        if token in stop:
            return
        yield token
        tokens = chosen.view(1, 1)
