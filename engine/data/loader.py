"""Data loaders: token files to batches, in random, sequential, shuffled or packed order.

Every loader is a pure function of the step: `loader.batch(step)` draws what step `step` trains on from a counter-based
generator keyed by (seed, step). So there is no iterator to save: the state of a loader *is* the step number, a resumed
run neither replays nor skips, and neither the number of prefetching workers nor the number of ranks can change the
order. A rank takes its share of the rows of the same global batch.

    RandomWindows    B windows anywhere in the text, with replacement: the classic for pretraining
    Epochs           every window once per epoch, shuffled or in order; `stride` < T makes the windows overlap
    PackedDocuments  whole documents side by side in a row, with the borders (`cu_seqlens`) that keep them apart

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .tokens import TokenSplit

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and next-token targets. `cu_seqlens` delimits packed documents in the flattened rows."""

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Denominator of the mean loss: the number of targets that are not IGNORE."""
        return (self.targets_BT != IGNORE).sum()

    def rows(self, start: int, stop: int) -> Batch:
        """A micro-batch: some rows of this batch."""
        T = self.tokens_BT.shape[1]
        borders = self.cu_seqlens
        if borders is not None:
            borders = borders[(borders >= start * T) & (borders <= stop * T)] - start * T
        positions = None if self.positions_BT is None else self.positions_BT[start:stop]
        return Batch(self.tokens_BT[start:stop], self.targets_BT[start:stop], positions, borders)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; through pinned memory on CUDA, so that the copy is asynchronous."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        def move_if_any(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        positions, borders = move_if_any(self.positions_BT), move_if_any(self.cu_seqlens)
        return Batch(move(self.tokens_BT), move(self.targets_BT), positions, borders)


class Loader(Protocol):
    """Interface of a data loader."""

    batch_size: int
    context: int

    def __len__(self) -> int:
        """Batches in one epoch."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, the same at every call."""
        ...


def generator(seed: int, *counter: int) -> np.random.Generator:
    """Counter-based random generator: a pure function of (seed, counter)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counter])))


def get_batch(
    tokens: np.ndarray,
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T): `batch_size` uniformly drawn windows of a token array; targets are one token ahead."""
    _require_length(len(tokens), context_length)
    starts_B = torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()
    batch = _windows(tokens, starts_B, context_length)
    return batch.tokens_BT.to(device), batch.targets_BT.to(device)


def _windows(tokens: np.ndarray, starts_B: np.ndarray, T: int, learn: np.ndarray | None = None) -> Batch:
    places_BT = starts_B[:, None] + np.arange(T + 1)
    both = torch.from_numpy(tokens[places_BT].astype(np.int64))
    targets_BT = both[:, 1:].contiguous()
    if learn is not None:
        targets_BT[torch.from_numpy(learn[places_BT[:, 1:]] == 0)] = IGNORE
    return Batch(both[:, :-1].contiguous(), targets_BT)


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches of one context length into one batch."""
    T = batches[0].tokens_BT.shape[1]
    tokens_BT, targets_BT = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens_BT", "targets_BT")
    )
    borders, positions, rows = [], [], 0
    for batch in batches:
        if batch.cu_seqlens is None or batch.positions_BT is None:
            return Batch(tokens_BT, targets_BT)
        borders.append(batch.cu_seqlens[1 if borders else 0 :] + rows * T)
        positions.append(batch.positions_BT)
        rows += len(batch.tokens_BT)
    positions_BT = torch.cat(positions)
    return Batch(tokens_BT, targets_BT, positions_BT, torch.cat(borders))


def _require_length(length: int, T: int) -> None:
    if length < T + 1:
        raise InputError(
            f"the text has {length} tokens, too few for one window of context_length {T} and its next token: "
            f"give more text or a context of at most {max(length - 1, 0)}"
        )


class RandomWindows:
    """Random windows: start positions drawn with replacement at every step."""

    def __init__(self, split: TokenSplit, batch_size: int, context: int, seed: int = 0) -> None:
        _require_length(len(split), context)
        self.tokens, self.learn = split.tokens, split.learn
        self.batch_size, self.context, self.seed = batch_size, context, seed

    def __len__(self) -> int:
        return max(1, len(self.tokens) // (self.batch_size * self.context))

    def batch(self, step: int) -> Batch:
        starts_B = generator(self.seed, step).integers(len(self.tokens) - self.context, size=self.batch_size)
        return _windows(self.tokens, starts_B, self.context, self.learn)


class _Rows:
    """Base of loaders that walk through rows 0 … n−1 once an epoch; batches may straddle two epochs."""

    batch_size: int
    seed: int
    shuffle: bool

    def __init__(self) -> None:
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def count(self, epoch: int) -> int:
        raise NotImplementedError

    def __len__(self) -> int:
        return max(1, self.count(0) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        kept_epoch, order = self._order
        if kept_epoch != epoch:
            count = self.count(epoch)
            order = generator(self.seed, epoch).permutation(count) if self.shuffle else np.arange(count)
            self._order = (epoch, order)
        return order

    def row_numbers(self, step: int) -> np.ndarray:
        """Rows of step `step`: the epochs' permutations concatenated, cut into batches."""
        rows, count = np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.count(0)
        epochs = rows // count
        return np.concatenate([self.order(int(epoch))[rows[epochs == epoch] % count] for epoch in np.unique(epochs)])


class Epochs(_Rows):
    """Every window once an epoch. `stride` is the distance between windows: T by default; less makes them overlap."""

    def __init__(
        self,
        split: TokenSplit,
        batch_size: int,
        context: int,
        seed: int = 0,
        stride: int | None = None,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        _require_length(len(split), context)
        if stride is not None and stride < 1:
            raise InputError(f"stride must be at least 1 token, not {stride}")
        self.tokens, self.learn = split.tokens, split.learn
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.stride, self.shuffle = stride or context, shuffle

    def count(self, epoch: int) -> int:
        return (len(self.tokens) - self.context - 1) // self.stride + 1

    def batch(self, step: int) -> Batch:
        return _windows(self.tokens, self.row_numbers(step) * self.stride, self.context, self.learn)


class PackedDocuments(_Rows):
    """Sequence packing: whole documents in each row, positions reset; longer documents are cut into rows.

    Pieces are fitted longest first into the fullest row that has room (best fit), once, for all epochs; what remains of
    a row is padding without a target. Epochs shuffle the rows.
    """

    def __init__(self, split: TokenSplit, batch_size: int, context: int, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__()
        self.tokens, self.learn = split.tokens, split.learn
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.shuffle = shuffle
        self.packed = pack(split.starts, len(split.tokens), context, split.learn)
        if not self.packed:
            raise InputError("no document has two tokens, so there is nothing to predict")

    def count(self, epoch: int) -> int:
        return len(self.packed)

    def batch(self, step: int) -> Batch:
        B, T = self.batch_size, self.context
        tokens_BT, targets_BT = np.zeros((B, T), np.int64), np.full((B, T), IGNORE, np.int64)
        positions_BT, borders = np.zeros((B, T), np.int64), [0]
        for row, number in enumerate(self.row_numbers(step)):
            at = 0
            for start, length in self.packed[number]:
                piece = np.asarray(self.tokens[start : start + length + 1], np.int64)
                tokens_BT[row, at : at + length] = piece[:-1]
                learned = slice(None) if self.learn is None else self.learn[start + 1 : start + length + 1] > 0
                targets_BT[row, at : at + length][learned] = piece[1:][learned]
                positions_BT[row, at : at + length] = np.arange(length)
                at += length
                borders.append(row * T + at)
            if at < T:
                positions_BT[row, at:] = np.arange(T - at)
                borders.append((row + 1) * T)
        arrays = (tokens_BT, targets_BT, positions_BT, np.array(borders, np.int32))
        return Batch(*map(torch.from_numpy, arrays))


def pack(starts: np.ndarray, total: int, T: int, learn: np.ndarray | None = None) -> list[list[tuple[int, int]]]:
    """Best-fit-decreasing packing: rows of (start, number of inputs) pieces, at most T inputs a row.

    Every piece is followed by its own last target. Pieces without a target (the beginning of a conversation longer than
    a row) are left out.
    """
    ends = np.append(starts[1:], total)
    pieces = [
        (int(at), int(min(T, end - 1 - at)))
        for start, end in zip(starts, ends)
        for at in range(int(start), int(end) - 1, T)
    ]
    if learn is not None:
        pieces = [(at, length) for at, length in pieces if learn[at + 1 : at + length + 1].any()]
    pieces.sort(key=lambda piece: -piece[1])
    rows: list[list[tuple[int, int]]] = []
    open_rows: list[list[int]] = [[] for _ in range(T + 1)]  # row numbers by the room they have left
    roomy = 0  # bit r is set when a row with r tokens of room exists: the tightest fit is its lowest set bit
    for piece in pieces:
        fitting = roomy >> piece[1] << piece[1]
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            number = open_rows[room].pop()
            roomy &= ~(1 << room) if not open_rows[room] else -1
            rows[number].append(piece)
        else:
            room, number = T, len(rows)
            rows.append([piece])
        left = room - piece[1]
        if left:
            open_rows[left].append(number)
            roomy |= 1 << left
    return rows


def is_packed(kind: str, split: TokenSplit) -> bool:
    """Return whether `--order` packs whole documents into rows (sequence packing)."""
    return kind == "packed" or (kind == "auto" and split.learn is not None)


def open_loader(
    kind: str, split: TokenSplit, batch_size: int, context: int, seed: int, stride: int | None = None
) -> Loader:
    """Make the loader that `--order` names; `auto` is packed for conversations and random for other text."""
    if kind == "auto":
        kind = "packed" if is_packed(kind, split) else "random"
    if kind == "random":
        return RandomWindows(split, batch_size, context, seed)
    if kind in ("epochs", "sequential"):
        return Epochs(split, batch_size, context, seed, stride, shuffle=kind == "epochs")
    if kind == "packed":
        return PackedDocuments(split, batch_size, context, seed)
    raise InputError(f"order must be auto, random, epochs, sequential or packed, not {kind!r}")


def prefetch(loader: Loader, start: int, device: torch.device, workers: int = 1) -> Iterator[Batch]:
    """Yield batches from step `start` on, prefetched by `workers` threads (0: made when asked for)."""
    if workers == 0:
        step = start
        while True:
            yield loader.batch(step).to(device)
            step += 1
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        queue: collections.deque[Future[Batch]] = collections.deque()
        step = start
        while True:
            while len(queue) < workers + 1:
                queue.append(pool.submit(loader.batch, step))
                step += 1
            yield queue.popleft().result().to(device)
