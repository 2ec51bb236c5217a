"""Micro-benchmarks of the ops of a demo-sized training step: 16 rows of 256 tokens, width 256."""

import pytest
import torch

from warploom import kernels

TOKENS, WIDTH, HEADS, KV_HEADS, HEAD, VOCAB = 4096, 256, 4, 2, 64, 4096


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def heads(count: int) -> torch.Tensor:
    return normal(16, 256, count, HEAD)


def rotate():
    cos, sin = kernels.rope_tables(HEAD, 256, 1e4)
    q, k = heads(HEADS), heads(KV_HEADS)
    return lambda: torch.cat(kernels.rope(q, k, cos, sin), dim=2)


def attend():
    q, k, v = heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)
    return lambda: kernels.attention(q, k, v)


def normalize():
    x, weight = normal(TOKENS, WIDTH), normal(WIDTH)
    return lambda: kernels.rms_norm(x, weight)


def gate():
    x = normal(TOKENS, 2 * 704)
    return lambda: kernels.swiglu_packed(x)


def head_and_loss():
    hidden, weight = normal(TOKENS, WIDTH), normal(VOCAB, WIDTH)
    targets = torch.arange(TOKENS) % VOCAB
    return lambda: kernels.linear_cross_entropy(hidden, weight, targets)


OPS = {make.__name__: make for make in (normalize, rotate, gate, attend, head_and_loss)}


@pytest.mark.parametrize("op", OPS)
def test_forward(benchmark, op):
    call = OPS[op]()
    with torch.no_grad():
        assert torch.isfinite(benchmark(call)).all()


@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward(benchmark, op):
    call = OPS[op]()
    benchmark(lambda: call().sum().backward())
