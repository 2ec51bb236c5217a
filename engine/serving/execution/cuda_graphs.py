"""CUDA graphs for decoding steps, from input tokens to sampled tokens.

A step's hundreds of small launches become one. A graph replays the very launches it recorded, at the addresses it
recorded. So all that a step needs from the host goes in one copy to a buffer that never moves, and batches are padded
to a few shapes: a number of sequences, and pages for the longest of them, from which the grid of attention follows.
Padding rows have no queries and write to a row that nobody reads. Where logits are to be changed or described, the
runner draws again, from the hidden states.

All shapes are recorded at start-up, largest first, into one pool of memory that the smaller ones use again, and for
which `graph_memory` keeps room beside the pages. Nothing here may take serving down: what cannot be recorded is warned
of once, and its batches run in a larger shape or without a graph. WARPLOOM_GRAPHS=0 records nothing.

Recording is a parameter, so that everything but the recording itself is the same, and tested, on a CPU.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..scheduling.step import UNKNOWN
from .kv_cache import AttentionMetadata, KernelAttention, PagedKVCache, buffer_bytes, buffer_views

Run = Callable[[], tuple[Tensor, Tensor]]
"""Returns a step's hidden states and the tokens sampled from them."""
Record = Callable[[Run], Run]
SHORTEST = 1024
"""Context of the smallest shape, in tokens. Others double: at most half of attention's grid is idle."""
NODE_BYTES = 8192
"""Memory of one recorded launch; an assumption, on the safe side."""


class Shape(NamedTuple):
    """Shape of a graph: sequences of the batch, and pages of the longest."""

    size: int
    pages: int


def enabled() -> bool:
    """Return whether CUDA graphs are enabled (WARPLOOM_GRAPHS)."""
    return os.environ.get("WARPLOOM_GRAPHS", "1") != "0"


def shapes(max_batch: int, most_pages: int, page_size: int) -> list[Shape]:
    """Batch shapes to capture, largest first. Products take 16 or 64 rows at a time: more sizes would save nothing."""
    sizes = {min(size, max_batch) for size in (1, 2, 4, 8, 16, 32, *range(64, max_batch + 64, 64))}
    doubled = {-(-SHORTEST // page_size) << i for i in range(most_pages.bit_length())}
    return sorted(
        (Shape(size, pages) for size in sizes for pages in {min(pages, most_pages) for pages in doubled}),
        key=lambda shape: (shape.size * shape.pages, shape),
        reverse=True,
    )


def graph_memory(config, max_batch: int, context: int, itemsize: int) -> int:
    """Estimated bytes of all graphs: the shared pool, as large as the largest step, and their nodes."""
    rows, heads = max_batch, config.n_heads + 2 * config.kv_heads
    experts = config.experts_per_token if config.n_experts else 1
    widest = max(2 * heads * config.head_size, 3 * experts * config.d_ff + experts * config.d_model)
    activations = 2 * rows * itemsize * (4 * config.d_model + widest)
    logits = rows * config.vocab_size * itemsize * (4 if config.logit_softcap else 1)
    segments = rows * config.n_heads * -(-context // 256) * (config.head_size + 2) * 4
    graphs = len(shapes(max_batch, context, 1))
    return activations + logits + segments + graphs * NODE_BYTES * (16 + 16 * config.n_layers)


class DecodeGraphs:
    """Captured graphs of decoding steps, in which every sequence computes one token and samples the next.

    `tokens` holds each row's tokens, and one row more, where padding writes. `draw` samples tokens from hidden states,
    for these rows at these positions."""

    def __init__(
        self,
        model,
        store: PagedKVCache,
        tokens: Tensor,
        most_pages: int,
        record: Record,
        draw: Callable[[Tensor, Tensor, Tensor], Tensor],
    ):
        self.model, self.store, self.tokens, self.draw = model, store, tokens, draw
        self.replays: dict[Shape, Run] = {}
        known = shapes(len(tokens) - 1, most_pages, store.page_size)
        largest = max(buffer_bytes(_inputs(shape)) for shape in known)
        self.buffer = torch.zeros(largest, dtype=torch.uint8, device=tokens.device)
        self._record_all(known, record)

    @torch.inference_mode()
    def _record_all(self, known: list[Shape], record: Record) -> None:
        self.model.eval()
        for shape in known:
            nobody = np.zeros(0, dtype=np.int64)
            self._send(shape, nobody, nobody, None)
            try:
                self.replays[shape] = record(partial(self._run, shape))
            except Exception as error:  # whatever it is, there is another way to serve
                said = str(error).splitlines() or [type(error).__name__]
                warnings.warn(
                    f"CUDA graphs: recording {shape.size} sequences of {shape.pages} pages failed ({said[0]}); steps "
                    f"without a graph of their own are slower, not different. WARPLOOM_GRAPHS=0 records none.",
                    stacklevel=2,
                )
                return

    def __call__(self, tokens: np.ndarray, rows: np.ndarray, layout: AttentionMetadata) -> tuple[Tensor, Tensor] | None:
        """Replay: (hidden states of one token a sequence, sampled tokens); None if no graph is large enough."""
        T, pages = layout.tables.shape
        shape = min((one for one in self.replays if one.size >= T and one.pages >= pages), default=None)
        if shape is None:
            return None
        self._send(shape, tokens, rows, layout)
        hidden_TC, drawn_T = self.replays[shape]()
        return hidden_TC[:T], drawn_T[:T]

    def _send(self, shape: Shape, tokens: np.ndarray, rows: np.ndarray, layout: AttentionMetadata | None) -> None:
        """Copy a step's inputs, or padding, into the static input buffer of this shape."""
        size = buffer_bytes(_inputs(shape))
        staged = torch.empty(size, dtype=torch.uint8, pin_memory=self.buffer.device.type == "cuda")
        T = len(tokens)
        given = (tokens, rows, *layout.arrays()) if layout else [None] * len(_PADDING)
        for there, here, padding in zip(buffer_views(staged, _inputs(shape)), given, _PADDING):
            there = there.numpy()
            if padding is not None:
                there.fill(len(self.tokens) - 1 if padding == "spare row" else T if padding == "end" else padding)
            if here is not None:
                there[tuple(slice(n) for n in here.shape)] = here
        self.buffer[:size].copy_(staged, non_blocking=True)

    def _run(self, shape: Shape) -> tuple[Tensor, Tensor]:
        tokens, rows, positions, *step = buffer_views(self.buffer, _inputs(shape))
        tokens = torch.where(tokens == UNKNOWN, self.tokens[rows, positions].long(), tokens)
        self.tokens[rows, positions] = tokens.int()
        attend = KernelAttention(self.store, positions, *step)
        hidden_TC = self.model.hidden(tokens[None], positions[None], attend)[0]
        where = rows, positions + 1
        drawn_T = self.draw(hidden_TC, *where)
        self.tokens[where] = drawn_T.int()
        return hidden_TC, drawn_T


_PADDING = (0, "spare row", 0, -1, None, 0, 0, "end")
"""Of tokens, rows, positions, slots, page tables, contexts, counts and starts."""


def _inputs(shape: Shape) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of a graph's inputs, in the order of `_PADDING`."""
    by_token, by_sequence = (torch.int64, (shape.size,)), (torch.int32, (shape.size,))
    starts = torch.int32, (shape.size + 1,)
    return [*[by_token] * 4, (torch.int32, (shape.size, shape.pages)), by_sequence, by_sequence, starts]


def record_cuda() -> Record:
    """Make a capture function; all its graphs share one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run) -> Run:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compile and choose kernels before anything is recorded
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # By default any thread of the process that calls CUDA, a server's for instance, would end the recording.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = run()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay

    return record
