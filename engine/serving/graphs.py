"""CUDA graphs for decoding: a step's hundreds of small launches become one.

A graph replays the very launches it recorded, at the addresses it recorded. So inputs are copied into buffers that
never move, and batches are padded to a few sizes, each recorded when it is first met: start-up stays short. Padding
rows have no queries and write nowhere. Recording is a parameter, so that everything but the recording itself is the
same, and tested, on a CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .store import KernelAttend, PageStore

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class DecodeGraphs:
    """Runs the model for steps in which every sequence computes one token."""

    def __init__(self, model, store: PageStore, max_batch: int, pages_per_row: int, record: Record):
        self.model, self.store, self.record = model, store, record
        device = store.keys.device
        self.sizes = sorted({min(size, max_batch) for size in (1, 2, 4, *range(8, max_batch + 8, 8))})
        self.tokens, self.positions, self.slots = (
            torch.zeros(max_batch, dtype=torch.int64, device=device) for _ in "tps"
        )
        self.contexts, self.counts = (torch.zeros(max_batch, dtype=torch.int32, device=device) for _ in "cc")
        self.starts = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(max_batch, pages_per_row, dtype=torch.int32, device=device)
        self.replays: dict[int, Callable[[], Tensor]] = {}

    def __call__(self, tokens_T: Tensor, step: list[Tensor]) -> Tensor:
        """The hidden states of one token of each sequence; `step` is the layout on the device."""
        T = len(tokens_T)
        size = next(size for size in self.sizes if size >= T)
        positions, slots, tables, contexts, counts, starts = step
        self.slots[:size] = -1
        self.contexts[:size] = self.counts[:size] = 0
        self.tokens[:T], self.positions[:T], self.slots[:T] = tokens_T, positions, slots
        self.contexts[:T], self.counts[:T] = contexts, counts
        self.starts[: size + 1] = T
        self.starts[: T + 1] = starts
        self.tables[:T, : tables.shape[1]] = tables
        if size not in self.replays:
            self.replays[size] = self.record(lambda: self._run(size))
        return self.replays[size]()[:T]

    def _run(self, size: int) -> Tensor:
        inputs = self.positions, self.slots, self.tables, self.contexts, self.counts
        attend = KernelAttend(self.store, *(tensor[:size] for tensor in inputs), self.starts[: size + 1])
        return self.model.hidden(self.tokens[None, :size], self.positions[None, :size], attend)[0]


def record_cuda(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what `run` launches; calling the result launches it again."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # compile and choose kernels before anything is recorded
        run()
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = run()

    def replay() -> Tensor:
        graph.replay()
        return hidden

    return replay
