"""Model runner: runs step plans on one model.

All chunks of a step, prefill and decode alike, are concatenated to one row of tokens, and the model runs over it once.
Its `attend` writes the new keys and values into pages and lets every chunk look at its own sequence through the page
table; nothing else in the model knows that there are several sequences. Then the head runs on the few positions that
sample.

What does not change from step to step stays in place, by row: page tables, sampling settings, the tokens themselves. So
a step needs a few small arrays from the host, and a token that was sampled by the step before is read on
the device, before the host has seen it.

Batch invariance: a result must not depend on the rest of the batch. Our own products give a row the same bits in any
batch, and attention goes query by query. PyTorch's products on a CPU do so from some number of rows on, which is
measured once (`deterministic_min_rows`) and reached by padding.

T tokens of the step, N chunks, R sampled positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.packed_weight import PackedLinear
from ...memory import PeakMemory, available_memory
from ...model import Linear, Transformer
from ..scheduling.step import UNKNOWN, Chunk, ChunkResult, NewRow, StepPlan, StepResult, TokenLogprob
from . import cuda_graphs
from .cuda_graphs import DecodeGraphs
from .kv_cache import PagedKVCache, to_device, to_host
from .lora import ServedAdapters
from .sampler import Logprobs, RowSettings, penalize
from .serving_model import Head, NativeTransformer, deterministic_min_rows

SCORED = 256  # prompt tokens whose logits are held at a time: over a large vocabulary they outgrow everything else


ReadLogprobs = Callable[[], tuple[TokenLogprob, ...]]


@dataclass(slots=True)
class InFlightStep:
    """A launched step: its plan, and results that are still being computed."""

    plan: StepPlan
    sampled: Callable[[], list[int]]  # token ids, R; waits for them
    draft_accepted: Callable[[], list[bool]]  # R: whether a draft stood where the token now stands, and was the same
    spans: list[range]  # range of sampled positions (R) of each chunk
    logprobs: dict[int, list[ReadLogprobs]]  # by chunk
    prompt_logprobs: dict[int, list[ReadLogprobs]]
    pooled: dict[int, np.ndarray]


class Runner:
    """Runner of one model and its paged KV cache."""

    alive = True

    def __init__(
        self,
        model,
        store: PagedKVCache,
        *,
        max_batch: int,
        context: int,
        head: Head,
        batch_invariant: bool = True,
        adapters: ServedAdapters | None = None,
    ):
        self.model, self.store, self.adapters = model, store, adapters
        self.head = head
        self.device = model.device
        self.settings = RowSettings(max_batch + 1, self.device)  # and of the row where graphs write their padding
        self.table = np.zeros((max_batch, -(-context // store.page_size)), dtype=np.int32)
        self.tokens = torch.zeros(max_batch + 1, context + 1, dtype=torch.int32, device=self.device)
        self.rows: dict[int, NewRow] = {}
        self.sums: dict[int, np.ndarray] = {}  # running sums of prompts' hidden states (mean pooling), by row
        by_torch = not isinstance(model, NativeTransformer) and any(
            isinstance(module, (Linear, PackedLinear)) for module in model.blocks.modules()
        )
        padded = batch_invariant and self.device.type == "cpu" and (by_torch or head.needs_padding)
        least = deterministic_min_rows(model.embedding.weight.dtype) if padded else 1
        self.least_tokens = least if by_torch else 1
        self.least_samples = least if head.needs_padding else 1

        self.graphs: DecodeGraphs | None = None
        recordable = self.device.type == "cuda" and type(model) is Transformer and adapters is None
        if recordable and cuda_graphs.enabled():
            self.record_graphs(cuda_graphs.record_cuda())

    def record_graphs(self, record: cuda_graphs.Record) -> None:
        """Capture CUDA graphs of decoding steps."""

        def draw(hidden_RC: Tensor, rows_R: Tensor, positions_R: Tensor) -> Tensor:
            return self.settings.draw(self.head(hidden_RC), rows_R, positions_R)

        self.graphs = DecodeGraphs(self.model, self.store, self.tokens, self.table.shape[1], record, draw)

    def close(self) -> None:
        """Release all resources."""

    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan and wait for the result."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlightStep:
        """Start running a plan; asynchronous on a GPU."""
        if self.model.training:
            self.model.eval()
        self.store.copy(plan.copies)
        for admission in plan.admitted:
            self._admit(admission)
        for chunk in plan.chunks:
            self.table[chunk.row, chunk.first_page : chunk.first_page + len(chunk.pages)] = chunk.pages
        return self._sample(plan, *self._forward(plan.chunks))

    @torch.inference_mode()
    def collect(self, flight: InFlightStep) -> StepResult:
        """Wait for a step and return its result."""
        sampled = flight.sampled()
        drafts = any(len(span) > 1 for span in flight.spans)
        draft_accepted = flight.draft_accepted() if drafts else ()
        results = []
        for index, (chunk, span) in enumerate(zip(flight.plan.chunks, flight.spans)):
            right = next((i for i, place in enumerate(span[:-1]) if not draft_accepted[place]), len(span) - 1)
            tokens = tuple(sampled[span.start : span.start + right + 1])
            grammar = self.rows[chunk.row].grammar
            if grammar is not None:
                tokens = _accept(grammar, tokens)
            reports = (kind.get(index, ()) for kind in (flight.logprobs, flight.prompt_logprobs))
            results.append(
                ChunkResult(
                    tokens,
                    *(tuple(chain(*(read() for read in each))) for each in reports),
                    pooled=flight.pooled.get(index),
                )
            )
        return StepResult(tuple(results))

    def _admit(self, admission: NewRow) -> None:
        row = admission.row
        self.rows[row] = admission
        self.settings.admit(row, admission.params, admission.seed)
        (tokens,) = self._to_device(np.array(admission.tokens, dtype=np.int32))
        self.tokens[row, : len(tokens)] = tokens

    def _forward(self, chunks: tuple[Chunk, ...]) -> tuple[Tensor, Tensor | None]:
        """Hidden states of all chunks, concatenated; and the sampled tokens if a CUDA graph sampled them."""
        counts = [len(chunk.tokens) for chunk in chunks]
        T, rows = sum(counts), np.array([chunk.row for chunk in chunks])
        padded = max(T, self.least_tokens)
        tokens, positions = np.zeros(padded, dtype=np.int64), np.zeros(padded, dtype=np.int64)
        tokens[:T] = [token for chunk in chunks for token in chunk.tokens]
        positions[:T] = np.concatenate([np.arange(c.start, c.start + n) for c, n in zip(chunks, counts)])
        layout = self.store.layout(self.table, rows, positions, np.array(counts, dtype=np.int32))
        if self.graphs is not None and padded == sum(chunk.sampled for chunk in chunks) == len(chunks):
            replayed = self.graphs(tokens, rows, layout)
            if replayed is not None:
                return replayed
        tokens_T, row_T, *step = self._to_device(tokens, np.repeat(rows, counts), *layout.arrays())
        where = row_T, step[0][:T]
        if UNKNOWN in tokens[:T]:
            tokens_T[:T] = torch.where(tokens_T[:T] == UNKNOWN, self.tokens[where].long(), tokens_T[:T])
        self._record_tokens(*where, tokens_T[:T])
        if self.adapters is not None:
            self.adapters.begin_step([self.rows[row].adapter for row in rows], counts, self.device)
        return self.model.hidden(tokens_T[None], step[0][None], self.store.attend(layout, step))[0], None

    def _sample(self, plan: StepPlan, hidden_TC: Tensor, drawn_R: Tensor | None) -> InFlightStep:
        ends = list(accumulate(len(chunk.tokens) for chunk in plan.chunks))
        edges = accumulate((chunk.sampled for chunk in plan.chunks), initial=0)
        spans = [range(a, b) for a, b in pairwise(edges)]
        flight = InFlightStep(plan, list, list, spans, {}, {}, {})
        self._score_prompts(flight, hidden_TC, ends)
        self._pool_prompts(flight, hidden_TC, ends)
        places = [(chunk, end, i) for chunk, end in zip(plan.chunks, ends) for i in range(-chunk.sampled, 0)]
        if not places:
            return flight
        rows = [chunk.row for chunk, _, _ in places]
        if drawn_R is not None and not self._changed(rows) and not self._described(flight):
            flight.sampled = to_host(drawn_R)
            return flight
        positions = np.array([chunk.start + len(chunk.tokens) + 1 + i for chunk, _, i in places])
        index_R, positions_R = self._to_device(np.array(rows), positions)
        logits_RV = self._logits(hidden_TC, np.array([end + i for _, end, i in places]))
        changed_RV = self._apply_logits_processors(logits_RV, rows, positions)
        sampled_R = self.settings.choose(changed_RV, rows, index_R, positions_R)
        flight.sampled = to_host(sampled_R)
        if len(places) > sum(map(bool, spans)):  # some chunk has drafts
            flight.draft_accepted = to_host(self.tokens[index_R, positions_R] == sampled_R)
        self._record_tokens(index_R, positions_R, sampled_R)
        self._describe(flight, logits_RV, sampled_R)
        return flight

    def _logits(self, hidden_TC: Tensor, places: np.ndarray) -> Tensor:
        padded = np.zeros(max(len(places), self.least_samples), dtype=np.int64)
        padded[: len(places)] = places
        if self.device.type == "cpu" and hidden_TC.dtype == torch.float32:
            hidden_RC = torch.from_numpy(hidden_TC.numpy()[padded])  # torch would wake all its threads for it
        elif np.array_equal(padded, np.arange(len(hidden_TC))):  # every token of a decoding step
            hidden_RC = hidden_TC
        else:
            hidden_RC = hidden_TC[self._to_device(padded)[0]]
        return self.head(hidden_RC)[: len(places)].float()

    def _changed(self, rows: list[int]) -> list[int]:
        """Indices of rows whose logits a grammar, bias or penalty changes."""
        return [
            r for r, row in enumerate(rows) if self.settings.params[row].penalized
            or row in self.settings.bias or _binds(self.rows[row].grammar)
        ]  # fmt: skip

    def _described(self, flight: InFlightStep) -> list[int]:
        """Indices of chunks whose request wants log-probabilities."""
        chunks = zip(flight.plan.chunks, flight.spans)
        asked = (bool(span) and self.settings.params[chunk.row].logprobs is not None for chunk, span in chunks)
        return [i for i, one in enumerate(asked) if one]

    def _apply_logits_processors(self, logits_RV: Tensor, rows: list[int], positions: np.ndarray) -> Tensor:
        """Apply penalties, logit bias and grammar masks to the rows that have them."""
        changed = self._changed(rows)
        if not changed:
            return logits_RV
        logits_RV = logits_RV.clone()
        penalized = [r for r in changed if self.settings.params[rows[r]].penalized]
        if penalized:
            mine, params = [rows[r] for r in penalized], [self.settings.params[rows[r]] for r in penalized]
            lengths, prompts = positions[penalized], [self.rows[row].prompt_length for row in mine]
            past, (index,) = self.tokens[:, : lengths.max()], self._to_device(np.array(penalized))
            logits_RV[index] = penalize(logits_RV[index], params, past, mine, prompts, lengths)
        for r in changed:
            row, admission = rows[r], self.rows[rows[r]]
            if row in self.settings.bias:
                tokens, values = self.settings.bias[row]
                logits_RV[r, tokens] += values
            if _binds(admission.grammar):
                admission.grammar.mask(logits_RV[r])
        return logits_RV

    def _describe(self, flight: InFlightStep, logits_RV: Tensor, sampled_R: Tensor) -> None:
        """Start reading the log-probabilities of sampled tokens, in one pass over all chunks that want them."""
        asked = self._described(flight)
        if not asked:
            return
        tops = {i: self.settings.params[flight.plan.chunks[i].row].logprobs or 0 for i in asked}
        if len(asked) < sum(map(bool, flight.spans)):
            (places,) = self._to_device(np.concatenate([flight.spans[i] for i in asked]))
            logits_RV, sampled_R = logits_RV[places], sampled_R[places]
        found, first = Logprobs(logits_RV, sampled_R, max(tops[i] for i in asked)), 0
        for i in asked:
            last = first + len(flight.spans[i])
            flight.logprobs[i] = [partial(found.read, first, last, tops[i])]
            first = last

    def _score_prompts(self, flight: InFlightStep, hidden_TC: Tensor, ends: list[int]) -> None:
        for index, (chunk, end) in enumerate(zip(flight.plan.chunks, ends)):
            top = self.settings.params[chunk.row].prompt_logprobs
            count = min(len(chunk.tokens), self.rows[chunk.row].prompt_length - 1 - chunk.start)
            if top is None or count <= 0:
                continue
            places = np.arange(count) + end - len(chunk.tokens)
            targets = self.tokens[chunk.row, chunk.start + 1 : chunk.start + 1 + count].long()
            flight.prompt_logprobs[index] = [
                Logprobs(self._logits(hidden_TC, places[part]), targets[part], top).read
                for part in (slice(first, first + SCORED) for first in range(0, count, SCORED))
            ]

    def _pool_prompts(self, flight: InFlightStep, hidden_TC: Tensor, ends: list[int]) -> None:
        """Pool prompts' hidden states token by token: the same bits for any chunking of the prompt."""
        for index, (chunk, end) in enumerate(zip(flight.plan.chunks, ends)):
            row, length = chunk.row, self.rows[chunk.row].prompt_length
            if (pooling := self.rows[row].pooling) is None or chunk.start >= length:
                continue
            states = hidden_TC[end - len(chunk.tokens) : end].double().cpu().numpy()[: length - chunk.start]
            if pooling == "mean":
                before = self.sums.pop(row) if chunk.start else np.zeros_like(states[0])
                self.sums[row] = np.add.accumulate(np.vstack([before, states]))[-1]
            if chunk.start + len(states) == length:
                flight.pooled[index] = self.sums.pop(row) / length if pooling == "mean" else states[-1]

    def _record_tokens(self, rows_N: Tensor, positions_N: Tensor, tokens_N: Tensor) -> None:
        """Store tokens by row and position; on a CPU by NumPy, as PyTorch would wake all its threads for it."""
        if self.device.type == "cpu":
            self.tokens.numpy()[rows_N.numpy(), positions_N.numpy()] = tokens_N.numpy()
        else:
            self.tokens[rows_N, positions_N] = tokens_N.int()

    def _to_device(self, *arrays: np.ndarray) -> list[Tensor]:
        return to_device(arrays, self.device)


def _binds(grammar: Any) -> bool:
    return grammar is not None and grammar.active


def _accept(grammar: Any, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Advance a grammar; return the tokens that stand: drafts end where it begins to constrain."""
    for number, token in enumerate(tokens, 1):
        grammar.accept(token)
        if grammar.active:
            return tokens[:number]
    return tokens


def memory_for_pages(model: Transformer, max_batch_tokens: int, max_batch: int) -> int:
    """Bytes for the KV cache: on a GPU what a profiled largest step leaves free, else half of free memory."""
    if model.device.type != "cuda":
        return available_memory("cpu") // 2
    with torch.cuda.device(model.device):
        with PeakMemory("cuda") as peak:
            largest_step(model, max_batch_tokens, max_batch)
        free = available_memory("cuda")
    recorded = 0
    if cuda_graphs.enabled():
        itemsize = model.embedding.weight.element_size()
        recorded = cuda_graphs.graph_memory(model.config, max_batch, model.config.max_seq_len, itemsize)
    return max(0, free - peak.bytes - recorded - free // 10)  # a tenth for what is compiled, and cut in pieces


@torch.inference_mode()
def largest_step(model: Transformer, max_batch_tokens: int, max_batch: int) -> None:
    """Run the largest possible step, without cache, to measure its peak memory."""
    tokens = torch.zeros(1, max_batch_tokens, dtype=torch.int64, device=model.device)
    hidden_BTC = model.hidden(tokens, tokens, lambda q, k, v, layer: q)
    torch.log_softmax(model.logits(hidden_BTC[0, :max_batch]).float(), -1)
