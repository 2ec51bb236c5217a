"""The policy gradient as a weighted cross-entropy.

The gradient of every objective here is Σ wₜ ∇(−log pₜ) with a weight a token:

    on-policy                     w = A                                   the ratio is 1
    several updates, clipped      w = A r where r may still move, else 0   r = p now / p when sampled (PPO)
    with a KL penalty             w − β (1 − p₀ / p)                      the gradient of the estimator k3

Samples lie end to end, none padded; only attention sees them side by side. Where the server's C++ attention and head
run in float32 (`exact`), the forward pass takes both: what is trained then has the very bits of what was sampled, for
norms, rotation and gates add up in one order in trainer and server anyway, and so do the products of a fused block. Of
blocks with experts products are replaced by the server's too; as the router's are among them, tokens visit the experts
that they visited when they were sampled. Other models (LayerNorm, norms after sublayers, ungated), and all on a GPU,
are computed by the server once more, and their last hidden states replaced. The backward pass is the trainer's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model import Attend, Transformer, dense_attention
from ..serving.execution.gpu_model import BatchInvariantLinear
from ..serving.execution.kv_cache import KernelAttention, NativeAttend, PagedKVCache, to_device
from ..serving.execution.serving_model import NativeExperts, NativeLinear, NativeTransformer
from ..serving.llm import LLM
from ..training.evaluate import within_documents
from ..training.fused_block import FusedBlock
from .rollouts import Sample

PAGE = 16  # of `LLM`: sums over keys go page by page


@dataclass(frozen=True)
class Packed:
    """Samples laid end to end: N inputs, of which `places` (S) predict a token that was sampled."""

    tokens_1N: Tensor
    positions_1N: Tensor
    lengths: list[int]
    places_S: Tensor
    targets_S: Tensor
    sampled_S: Tensor
    """Log-probabilities when sampled."""
    advantages_S: Tensor


def pack(samples: list[Sample], device: torch.device) -> Packed:
    """Samples as tensors."""
    lengths = [len(sample.tokens) - 1 for sample in samples]
    starts = np.cumsum([0, *lengths[:-1]])
    inputs = np.concatenate([sample.tokens[:-1] for sample in samples])
    places = np.concatenate([start - 1 + np.array(sample.sampled) for start, sample in zip(starts, samples)])
    targets = np.concatenate([np.array(sample.tokens)[sample.sampled] for sample in samples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    likely = np.concatenate([np.array(sample.logprobs, np.float32) for sample in samples])
    counts = [len(sample.sampled) for sample in samples]
    advantages = np.repeat(np.array([sample.advantage for sample in samples], np.float32), counts)
    move = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    whole = (move(array)[None] for array in (inputs, positions))
    return Packed(*whole, lengths, *map(move, (places, targets, likely, advantages)))


def micro_batches(samples: list[Sample], tokens: int) -> list[list[Sample]]:
    """Samples by length, so that attention pads little, in batches of at most so many tokens (or one sample)."""
    parts: list[list[Sample]] = []
    room = 0
    for sample in sorted(samples, key=lambda sample: len(sample.tokens)):
        if len(sample.tokens) > room:
            parts.append([])
            room = tokens
        parts[-1].append(sample)
        room -= len(sample.tokens)
    return parts


def exact_obstacle(model: Transformer, llm: LLM, asked: bool = False) -> str | None:
    """Say what keeps trainer and server from the same bits, if anything does; on a GPU it must be `asked` for."""
    if _by_kernels(llm.engine.runner.model):
        return None if asked else "on a GPU its price is not measured: --exact True turns it on"
    if model.device.type != "cpu" or model.embedding.weight.dtype != torch.float32:
        return f"it needs float32 on a CPU, not {str(model.embedding.weight.dtype)[6:]} on {model.device.type}"
    runner = llm.engine.runner
    if runner.store.layers is None or llm.engine.scheduler.pool.page_size != PAGE:
        return "the C++ attention does not serve this model here"
    if not _is_fused(model) and not isinstance(runner.model, NativeTransformer) and not _twins(runner.model):
        return "neither the fused C++ block nor the C++ decoder computes this model here"
    return None


def _by_kernels(served: Transformer | NativeTransformer) -> bool:
    """Are the products of a served model the batch-invariant kernels, as on a GPU?"""
    return isinstance(served, Transformer) and any(isinstance(part, BatchInvariantLinear) for part in served.modules())


def _is_fused(model: Transformer) -> bool:
    return all(isinstance(block, FusedBlock) for block in model.blocks)


def _twins(served: Transformer) -> dict[str, nn.Module]:
    """The layers of a served model that are the server's own, by path."""

    def own(layer: nn.Module) -> bool:
        return isinstance(layer, NativeLinear) or isinstance(getattr(layer, "product", None), NativeExperts)

    return {path: layer for path, layer in served.named_modules() if own(layer)}


@contextlib.contextmanager
def server_layers(model: Transformer, served: Transformer | NativeTransformer) -> Iterator[None]:
    """Inside, layers called by themselves have the server's numbers, and the gradient of the trainer's."""

    def numbers_of(layer: nn.Module):
        def hook(_: nn.Module, given: tuple[Tensor], computed):
            with torch.no_grad():
                exact = layer(given[0].detach())
            if isinstance(computed, tuple):  # of experts, with how they were chosen
                return _Replaced.apply(computed[0], exact[0]), *computed[1:]
            return _Replaced.apply(computed, exact)

        return hook

    with contextlib.ExitStack() as hooks:
        for path, layer in ({} if isinstance(served, NativeTransformer) else _twins(served)).items():
            hooks.callback(model.get_submodule(path).register_forward_hook(numbers_of(layer)).remove)
        yield


class Policy:
    """A model, seen from its samples: log-probabilities, and the gradient of a weighted loss."""

    def __init__(self, model: Transformer, llm: LLM | None = None) -> None:
        """`llm` serves weights that are the model's own: then all is exact."""
        self.model, self.llm = model, llm

    def hidden(self, packed: Packed) -> Tensor:
        """Hidden states (S, C) of the places that predict, with gradient."""
        given, model, attend = (packed.tokens_1N, packed.positions_1N), self.model, self._attend(packed)
        served = self.llm and self.llm.engine.runner.model
        if served is None:
            hidden_1NC = model.hidden(*given, attend)
        elif _by_kernels(served) or (isinstance(served, NativeTransformer) and not _is_fused(model)):
            exactly: Any = server_attention(model, packed.lengths, by_kernels=_by_kernels(served))
            with torch.no_grad():
                exact_1NC = served.hidden(*given, exactly)
            hidden_1NC = _Replaced.apply(model.hidden(*given, attend), exact_1NC)
        else:
            exactly = server_attention(model, packed.lengths)
            with server_layers(model, served):
                hidden_1NC = model.hidden(*given, paged(exactly, attend))
        return hidden_1NC[0].index_select(0, packed.places_S)

    def _attend(self, packed: Packed) -> Attend:
        """Dense causal attention of the training pass."""
        if self.model.device.type == "cuda":
            borders = torch.tensor([0, *np.cumsum(packed.lengths)], dtype=torch.int32, device=self.model.device)
            return within_documents(borders, max(packed.lengths))
        return side_by_side(packed.lengths)

    @torch.no_grad()
    def log_probs(self, hidden_SC: Tensor, targets_S: Tensor) -> Tensor:
        """Log-probabilities of the targets; exact ones by the server's head, slab by slab."""
        hidden_SC = hidden_SC.detach()
        if self.llm is None:
            return -self.model.cross_entropy(hidden_SC, targets_S, reduction="none").float()
        head = self.llm.engine.runner.head
        found = [
            torch.log_softmax(head(hidden).float(), -1).gather(-1, targets[:, None])[:, 0]
            for hidden, targets in zip(hidden_SC.split(256), targets_S.split(256))
        ]
        return torch.cat(found)


def token_weights(
    logp_S: Tensor, packed: Packed, clip: float | None = None, kl: float = 0.0, reference_S: Tensor | None = None
) -> Tensor:
    """The weight of each token's −log p in the gradient; `clip` for samples that are no longer the policy's own."""
    weights_S = packed.advantages_S
    if clip is not None:
        ratio_S = (logp_S - packed.sampled_S).exp()
        beyond_S = torch.where(weights_S > 0, ratio_S > 1 + clip, ratio_S < 1 - clip)
        weights_S = torch.where(beyond_S, 0.0, weights_S * ratio_S)
    if kl:
        weights_S = weights_S - kl * (1 - (reference_S - logp_S).exp())
    return weights_S


def side_by_side(lengths: list[int]) -> Attend:
    """An `attend` over sequences laid end to end, padded for it alone: one call for all of them."""
    B, T = len(lengths), max(lengths)
    places_N = torch.cat([torch.arange(length) + row * T for row, length in enumerate(lengths)])

    def attend(q_1NHD: Tensor, k_1NKD: Tensor, v_1NKD: Tensor, layer) -> Tensor:
        padded = (
            x.new_zeros(B * T, *x.shape[2:]).index_copy(0, places_N, x[0]).unflatten(0, (B, T))
            for x in (q_1NHD, k_1NKD, v_1NKD)
        )
        return dense_attention(*padded, layer).flatten(0, 1).index_select(0, places_N)[None]

    return attend


def server_attention(model: Transformer, lengths: list[int], by_kernels: bool = False) -> Attend:
    """The server's `attend` over sequences laid end to end, on pages of its own."""
    config, pages = model.config, [-(-length // PAGE) for length in lengths]
    if not by_kernels:
        config = replace(config, n_layers=1)  # every layer uses the same pages, after the last
    where = model.embedding.weight.dtype, model.device
    store = PagedKVCache(config, sum(pages), PAGE, *where, latent=bool(config.kv_rank) and by_kernels)
    table = np.zeros((len(lengths), max(pages)), dtype=np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *pages[:-1]]), pages)):
        table[row, :count] = np.arange(first, first + count)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    layout = store.layout(table, np.arange(len(lengths)), positions, np.array(lengths, dtype=np.int32))
    if by_kernels:
        return KernelAttention(store, *to_device((*layout.arrays(),), model.device))
    assert store.layers is not None
    return NativeAttend(store.layers * model.config.n_layers, layout)


def paged(exact: Attend, dense: Attend) -> Attend:
    """An `attend` with the server's numbers and the gradient of `dense`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer) -> Tensor:
        return _Replaced.apply(dense(q, k, v, layer), exact(q.detach(), k.detach(), v.detach(), layer))

    return attend


class _Replaced(torch.autograd.Function):
    """Other numbers for the same function: the gradient goes to where the first ones came from."""

    @staticmethod
    def forward(ctx, computed: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream, None
