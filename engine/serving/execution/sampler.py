"""Sampler: logits to tokens, with sampling parameters per row.

The rows of a step belong to different requests, each with its own parameters. `RowSettings` keeps these in tensors with
one entry a row of the batch, written when a sequence takes the row; a step gathers those of the rows that sample. The
order is fixed: penalties, bias and grammar change the logits; temperature, top-k, top-p and min-p narrow the choice; a
counter-based draw keyed by (seed, position) chooses. No part of it looks at another row, so what a request gets
depends on the request alone. Log-probabilities are the model's own: of the logits before anything changed them.

R rows that sample, V vocabulary.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .... import kernels
from ..sampling_params import SamplingParams
from ..scheduling.step import TokenLogprob
from .kv_cache import HAS_NATIVE, _native, to_device, to_host

IMPOSSIBLE = -9999.0  # for a log-probability of −inf or NaN, as OpenAI says it: JSON has neither
_FIELDS = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}


class RowSettings:
    """Sampling parameters of all rows of the batch, as tensors on the device."""

    def __init__(self, rows: int, device: torch.device):
        self.numbers = {name: torch.zeros(rows, dtype=dtype, device=device) for name, dtype in _FIELDS.items()}
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.params: list[SamplingParams] = [SamplingParams()] * rows
        self.bias: dict[int, tuple[Tensor, Tensor]] = {}
        self.device = device

    def admit(self, row: int, params: SamplingParams, seed: int) -> None:
        """Set the parameters of a row for a new sequence."""
        for name, tensor in self.numbers.items():
            tensor[row] = getattr(params, name)
        self.seeds[row] = seed
        self.params[row] = params
        self.bias.pop(row, None)
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias), device=self.device)
            self.bias[row] = tokens, torch.tensor(list(params.logit_bias.values()), device=self.device)

    def choose(self, logits_RV: Tensor, rows: list[int], index_R: Tensor, positions_R: Tensor) -> Tensor:
        """Sample one token for each row of logits; `positions_R` are the positions of the new tokens."""
        native = HAS_NATIVE and self.device.type == "cpu"
        if not native and all(self.params[row].greedy for row in rows):
            return logits_RV.masked_fill(logits_RV.isnan(), -torch.inf).argmax(-1)  # the rule of `kernels.sample`
        return self.draw(logits_RV, index_R, positions_R)

    def draw(self, logits_RV: Tensor, index_R: Tensor, positions_R: Tensor) -> Tensor:
        """Sample in one launch without host synchronization, so that a CUDA graph can capture it."""
        settings = *self.numbers.values(), self.seeds, positions_R
        if HAS_NATIVE and self.device.type == "cpu":
            return _sample_native(logits_RV, index_R, *settings)
        return kernels.sample(logits_RV, *settings, index_R)


def _sample_native(logits_RV: Tensor, index_R: Tensor, *settings: Tensor) -> Tensor:
    """Sample in C++, with the settings looked up by row."""
    logits_RV = logits_RV.float().contiguous()
    tokens_R = torch.empty(len(logits_RV), dtype=torch.int64)
    _native.sample(logits_RV, index_R, *settings, tokens_R)
    return tokens_R


def penalize(
    logits_RV: Tensor, params: list[SamplingParams], tokens: Tensor, rows: list[int], prompts: list[int], lengths
) -> Tensor:
    """Apply each row's repetition, presence and frequency penalties, in one launch without synchronization.

    Row r has written the first `lengths[r]` of `tokens[rows[r]]`, of which the first `prompts[r]` are its prompt."""
    kinds = "repetition_penalty", "presence_penalty", "frequency_penalty"
    penalties = (np.array([getattr(one, kind) for one in params], dtype=np.float32) for kind in kinds)
    return kernels.penalize(
        logits_RV, tokens, *to_device((*map(np.array, (rows, prompts, lengths)), *penalties), logits_RV.device)
    )


class Logprobs:
    """Log-probabilities of tokens and of the `top` most likely ones, before penalties, bias or grammar."""

    def __init__(self, logits_RV: Tensor, tokens_R: Tensor, top: int):
        logprobs_RV = torch.log_softmax(logits_RV.float(), -1)
        own_R1 = logprobs_RV.gather(-1, tokens_R[:, None])
        ranks_R = torch.count_nonzero(logprobs_RV > own_R1, -1) + 1
        self._columns = [to_host(tokens_R), to_host(_possible(own_R1[:, 0])), to_host(ranks_R)]
        if top:
            best = logprobs_RV.topk(min(top, logits_RV.shape[-1]), -1)
            self._columns += [to_host(best.indices), to_host(_possible(best.values))]

    @cached_property
    def _rows(self) -> list[tuple]:
        return list(zip(*(column() for column in self._columns)))

    def read(self, first: int = 0, last: int | None = None, top: int | None = None) -> tuple[TokenLogprob, ...]:
        """Read the entries of these rows, with `top` alternatives each; waits for the device."""
        return tuple(
            TokenLogprob(token, value, tuple(zip(*(column[:top] for column in best))), rank)
            for token, value, rank, *best in self._rows[first:last]
        )


def _possible(logprobs: Tensor) -> Tensor:
    return logprobs.nan_to_num(nan=IMPOSSIBLE, neginf=IMPOSSIBLE)
