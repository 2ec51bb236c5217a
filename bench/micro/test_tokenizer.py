"""Micro-benchmarks of single tokenizer calls: a short text, a page, a token."""

import itertools

import pytest

from warploom.tokenizer import BPETokenizer

SHORT = "Call me Ishmael, said the whale."
PAGE = " ".join(f"{SHORT} It was chapter {number}, and the sea lay calm." for number in range(100))


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([PAGE], vocab_size=400)


@pytest.mark.parametrize("text", [SHORT, PAGE], ids=["short", "page"])
def test_encode(benchmark, tokenizer, text):
    assert tokenizer.decode(benchmark(tokenizer.encode, text)) == text


def test_encode_array(benchmark, tokenizer):
    assert len(benchmark(tokenizer.encode_array, PAGE)) == tokenizer.count(PAGE)


def test_decode(benchmark, tokenizer):
    assert benchmark(tokenizer.decode, tokenizer.encode(PAGE)) == PAGE


def test_stream_a_token(benchmark, tokenizer):
    stream, ids = tokenizer.stream(), itertools.cycle(tokenizer.encode(PAGE))
    benchmark(lambda: stream.push(next(ids)))
