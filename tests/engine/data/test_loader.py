import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.engine.data import Epochs, PackedDocuments, RandomWindows, get_batch, open_loader, prefetch
from warploom.engine.data.loader import IGNORE, pack
from warploom.engine.data.tokens import TokenSplit


def split_of(lengths):
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    return TokenSplit("train", np.arange(total, dtype=np.uint32), starts, total)


@pytest.mark.parametrize("kind", ["random", "epochs", "sequential", "packed"])
def test_loader_targets_next_tokens_by_step(kind):
    """Targets are the next tokens and a step is always the same batch."""
    split = split_of([50, 3, 80, 17, 200])
    first, second = (open_loader(kind, split, 4, 16, seed=7) for _ in range(2))
    for step in (0, 9, 3):
        batch, again = first.batch(step), second.batch(step)
        seen = batch.targets_BT != IGNORE
        assert torch.equal(batch.targets_BT[seen], batch.tokens_BT[seen] + 1)
        assert torch.equal(batch.tokens_BT, again.tokens_BT)
        assert torch.equal(batch.targets_BT, again.targets_BT)
    assert not torch.equal(first.batch(0).tokens_BT, first.batch(1).tokens_BT)


@pytest.mark.parametrize("kind", ["random", "epochs", "packed"])
def test_loader_order_by_seed_not_workers(kind):
    """The order depends on the seed and not on the number of workers."""
    split = split_of([40] * 20)
    loader, cpu = open_loader(kind, split, 3, 16, seed=1), torch.device("cpu")
    runs = [
        torch.stack([batch.tokens_BT for batch in itertools.islice(prefetch(loader, 5, cpu, workers), 12)])
        for workers in (0, 1, 4)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    other = open_loader(kind, split, 3, 16, seed=2)
    assert not torch.equal(loader.batch(0).tokens_BT, other.batch(0).tokens_BT)


@settings(max_examples=40)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.booleans())
def test_an_epoch_visits_every_window_exactly_once(total, T, stride, B, shuffle):
    if total < T + 1:
        return
    loader = Epochs(split_of([total]), B, T, seed=3, stride=stride, shuffle=shuffle)
    count = loader.count(0)
    rows = np.concatenate([loader.row_numbers(step) for step in range(2 * count // B + 1)])
    assert sorted(rows[:count]) == list(range(count)) == sorted(rows[count : 2 * count])[: len(rows) - count]
    assert (count - 1) * stride + T + 1 <= total < count * stride + T + 1


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(1, 16))
def test_packing_covers_targets_once(lengths, T):
    """Packing covers every prediction once and overfills no row."""
    split = split_of(lengths)
    rows = pack(split.starts, len(split.tokens), T)
    assert all(0 < sum(length for _, length in row) <= T for row in rows)
    inputs = sorted(at for row in rows for start, length in row for at in range(start, start + length))
    ends = set(np.cumsum(lengths) - 1)
    assert inputs == [token for token in range(sum(lengths)) if token not in ends]


def test_packed_documents_do_not_see_each_other():
    split = split_of([5, 9, 3, 30, 2, 7])
    loader = PackedDocuments(split, 2, 16)
    document = np.searchsorted(split.starts, np.arange(len(split)), side="right")
    for step in range(4):
        batch = loader.batch(step)
        tokens, targets, positions = (x.flatten() for x in (batch.tokens_BT, batch.targets_BT, batch.positions_BT))
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0 and borders[-1] == 32 and borders == sorted(borders)
        for start, stop in itertools.pairwise(borders):
            assert positions[start:stop].tolist() == list(range(stop - start))
            if targets[start] != IGNORE:
                assert len(set(document[tokens[start:stop].numpy()])) == 1
                assert document[int(targets[stop - 1])] == document[int(tokens[start])]
        half = batch.rows(1, 2)
        assert half.cu_seqlens.tolist() == [border - 16 for border in borders if border >= 16]


def test_get_batch_draws_every_window():
    """Get batch draws every window and repeats with its generator."""
    tokens = np.arange(12)
    inputs, targets = get_batch(tokens, 400, 8, "cpu", torch.Generator().manual_seed(0))
    assert inputs.dtype == torch.int64 and inputs.shape == (400, 8)
    assert torch.equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2, 3}
    again, _ = get_batch(tokens, 400, 8, "cpu", torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again)


def test_text_shorter_than_window_refused():
    """A text shorter than a window is refused with the numbers."""
    with pytest.raises(ValueError, match=r"3 tokens.*context_length 8.*at most 2"):
        get_batch(np.arange(3), 1, 8)
    with pytest.raises(ValueError, match="3 tokens"):
        RandomWindows(split_of([3]), 1, 8)
