"""Policy gradient as a weighted cross-entropy, optionally bit-identical to the sampler (exactly on-policy).

The gradient of every objective here is Σ wₜ ∇(−log pₜ) with a weight a token:

    on-policy                     w = A, the advantage                    the importance ratio is 1
    several updates, clipped      w = A r where r may still move, else 0   r = p now / p when sampled (PPO)
    with a KL penalty             w − β (1 − p₀ / p)                      the gradient of the estimator k3

Samples are concatenated without padding; only attention pads them. With `exact`, the forward pass gives the very bits
of the server that sampled, and the backward pass is the trainer's. There are three ways. Where the server's C++
attention and head run in float32, the forward pass calls both: norms, RoPE and gates sum in one order in trainer and
server anyway, and so do the products of a fused block. In MoE blocks the products are replaced by the server's too, the
router's included, so that tokens go to the experts that they went to when sampled. Other models (LayerNorm, post-norm,
ungated), and all on a GPU, run the server's forward pass once more and take its last hidden states.
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

PAGE = 16  # page size of `LLM`: sums over keys go page by page


@dataclass(frozen=True)
class Packed:
    """Samples packed end to end: N inputs; the hidden states at `places` (S) predict the sampled tokens."""

    tokens_1N: Tensor
    positions_1N: Tensor
    lengths: list[int]
    places_S: Tensor
    targets_S: Tensor
    sampled_S: Tensor
    """Log-probabilities when sampled."""
    advantages_S: Tensor


def pack(samples: list[Sample], device: torch.device) -> Packed:
    """Pack samples into tensors."""
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
    """Group samples by length (less padding in attention) into batches of at most `tokens` tokens, or one sample."""
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
    """Reason why trainer and server cannot compute the same bits, or None; on a GPU exactness must be `asked` for."""
    if _by_kernels(llm.engine.runner.model):
        return None if asked else "on a GPU its price is not measured: --exact True turns it on"
    if model.device.type != "cpu" or model.embedding.weight.dtype != torch.float32:
        return f"it needs float32 on a CPU, not {str(model.embedding.weight.dtype)[6:]} on {model.device.type}"
    runner = llm.engine.runner
    if runner.store.layers is None or llm.engine.scheduler.pool.page_size != PAGE:
        return "the C++ attention does not serve this model here"
    if not _is_fused(model) and not isinstance(runner.model, NativeTransformer) and not _replaced_layers(runner.model):
        return "neither the fused C++ block nor the C++ decoder computes this model here"
    return None


def _by_kernels(served: Transformer | NativeTransformer) -> bool:
    """Return whether the served model uses the batch-invariant GPU kernels."""
    return isinstance(served, Transformer) and any(isinstance(part, BatchInvariantLinear) for part in served.modules())


def _is_fused(model: Transformer) -> bool:
    return all(isinstance(block, FusedBlock) for block in model.blocks)


def _replaced_layers(served: Transformer) -> dict[str, nn.Module]:
    """Layers of the served model that the server replaced by its own, by path."""

    def own(layer: nn.Module) -> bool:
        return isinstance(layer, NativeLinear) or isinstance(getattr(layer, "product", None), NativeExperts)

    return {path: layer for path, layer in served.named_modules() if own(layer)}


@contextlib.contextmanager
def server_layers(model: Transformer, served: Transformer | NativeTransformer) -> Iterator[None]:
    """Context in which those layers return the server's values, with the trainer's gradient."""

    def numbers_of(layer: nn.Module):
        def hook(_: nn.Module, given: tuple[Tensor], computed):
            with torch.no_grad():
                exact = layer(given[0].detach())
            if isinstance(computed, tuple):  # of experts, with how they were chosen
                return _StraightThrough.apply(computed[0], exact[0]), *computed[1:]
            return _StraightThrough.apply(computed, exact)

        return hook

    with contextlib.ExitStack() as hooks:
        for path, layer in ({} if isinstance(served, NativeTransformer) else _replaced_layers(served)).items():
            hooks.callback(model.get_submodule(path).register_forward_hook(numbers_of(layer)).remove)
        yield


class Policy:
    """The policy: log-probabilities of sampled tokens, and the hidden states that the loss is computed from."""

    def __init__(self, model: Transformer, llm: LLM | None = None) -> None:
        """With an `llm` that serves these very weights, all values are bit-identical to sampling."""
        self.model, self.llm = model, llm

    def hidden(self, packed: Packed) -> Tensor:
        """Hidden states (S, C) at the positions that predict sampled tokens, differentiable."""
        given, model, attend = (packed.tokens_1N, packed.positions_1N), self.model, self._attend(packed)
        served = self.llm and self.llm.engine.runner.model
        if served is None:
            hidden_1NC = model.hidden(*given, attend)
        elif _by_kernels(served) or (isinstance(served, NativeTransformer) and not _is_fused(model)):
            exactly: Any = server_attention(model, packed.lengths, by_kernels=_by_kernels(served))
            with torch.no_grad():
                exact_1NC = served.hidden(*given, exactly)
            hidden_1NC = _StraightThrough.apply(model.hidden(*given, attend), exact_1NC)
        else:
            exactly = server_attention(model, packed.lengths)
            with server_layers(model, served):
                hidden_1NC = model.hidden(*given, straight_through_attention(exactly, attend))
        return hidden_1NC[0].index_select(0, packed.places_S)

    def _attend(self, packed: Packed) -> Attend:
        """The trainer's `attend` over packed samples."""
        if self.model.device.type == "cuda":
            borders = torch.tensor([0, *np.cumsum(packed.lengths)], dtype=torch.int32, device=self.model.device)
            return within_documents(borders, max(packed.lengths))
        return padded_attention(packed.lengths)

    @torch.no_grad()
    def log_probs(self, hidden_SC: Tensor, targets_S: Tensor) -> Tensor:
        """Log-probabilities of the targets; with an `llm`, by the server's head in slabs of rows."""
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
    """Weight of each token's −log p: advantage, clipped importance ratio (PPO) for stale samples, KL penalty."""
    weights_S = packed.advantages_S
    if clip is not None:
        ratio_S = (logp_S - packed.sampled_S).exp()
        beyond_S = torch.where(weights_S > 0, ratio_S > 1 + clip, ratio_S < 1 - clip)
        weights_S = torch.where(beyond_S, 0.0, weights_S * ratio_S)
    if kl:
        weights_S = weights_S - kl * (1 - (reference_S - logp_S).exp())
    return weights_S


def padded_attention(lengths: list[int]) -> Attend:
    """An `attend` over packed sequences that pads them into one batch."""
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
    """The server's paged `attend` over packed sequences, with pages of its own."""
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


def straight_through_attention(exact: Attend, dense: Attend) -> Attend:
    """An `attend` with the values of `exact` and the gradient of `dense`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer) -> Tensor:
        return _StraightThrough.apply(dense(q, k, v, layer), exact(q.detach(), k.detach(), v.detach(), layer))

    return attend


class _StraightThrough(torch.autograd.Function):
    """Straight-through replacement: forward returns other values, backward passes the gradient on."""

    @staticmethod
    def forward(ctx, computed: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream, None
