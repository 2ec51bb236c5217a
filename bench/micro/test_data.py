"""Micro-benchmarks of data loading: a batch before the model sees it."""

import numpy as np
import pytest
import torch

from warploom.engine.data import get_batch
from warploom.engine.data.loader import open_loader
from warploom.engine.data.tokens import TokenSplit

TOKENS = np.arange(1_000_000, dtype=np.uint16)
SPLIT = TokenSplit("train", TOKENS, np.arange(0, len(TOKENS), 1000), bytes=len(TOKENS))


@pytest.mark.parametrize("order", ["random", "epochs", "packed"])
def test_a_batch(benchmark, order):
    loader = open_loader(order, SPLIT, 16, 256, seed=0)
    batch = benchmark(loader.batch, 3)
    assert batch.tokens_BT.shape == (16, 256)


def test_get_batch(benchmark):
    inputs, targets = benchmark(get_batch, TOKENS, 16, 256, "cpu", torch.Generator().manual_seed(0))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
