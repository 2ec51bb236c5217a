import math

import numpy as np
import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.data.tokens import TokenSplit
from warploom.engine.model import Transformer
from warploom.engine.training.evaluate import evaluate, token_bytes, validation_batches
from warploom.tokenizer import BPETokenizer

TEXT = "the cat sat on the mat. the dog sat on the cat. " * 20


def split_of(tokens):
    return TokenSplit("val", np.asarray(tokens, np.uint16), np.zeros(1, np.int64), 0)


@pytest.fixture(scope="module")
def case():
    tokenizer = BPETokenizer.train([TEXT], vocab_size=270, special_tokens=("<|endoftext|>",))
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_seq_len=16)).eval()
    return model, tokenizer, tokenizer.encode(TEXT)


def test_evaluate_full_equals_definition(case):
    """A full evaluation counts every target once and equals the definition."""
    model, tokenizer, ids = case
    found = evaluate(model, validation_batches(split_of(ids), 3, 16), token_bytes(tokenizer))
    nll, size = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[start : start + 17]])
        logits = model(window[:, :-1]).detach().double()
        nll += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
        size += sum(len(tokenizer.token_bytes(i)) for i in window[0, 1:].tolist())
    few = evaluate(model, validation_batches(split_of(ids), 3, 16), token_bytes(tokenizer), rows=2)
    assert few.loss == pytest.approx(found.loss, rel=1e-6) and few.tokens == found.tokens == len(ids) - 1
    assert found.loss == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert size == len(TEXT) - len(tokenizer.token_bytes(ids[0]))


def test_evaluate_limited_spreads_over_split():
    """A limited evaluation spreads over the whole split."""
    batches = list(validation_batches(split_of(np.arange(2000)), 2, 16, limit=5))
    starts = [int(row[0]) for batch in batches for row in batch.tokens_BT]
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] > 1960
    assert max(np.diff(starts)) - min(np.diff(starts)) <= 16


def test_evaluate_split_shorter_than_context(case):
    """A split shorter than the context is still evaluated."""
    model, _, ids = case
    assert evaluate(model, validation_batches(split_of(ids[:5]), 3, 16)).tokens == 4
