"""Attention for training on a CPU, one pass for float32 and bfloat16, held to the formula in float64."""

import itertools

import pytest
import torch

from warploom import kernels
from warploom.kernels.cpu import pointwise
from warploom.kernels.cpu.attention import LONGEST, fuses

FORMATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
needs_passes = pytest.mark.skipif(not pointwise.HAS_NATIVE, reason="the C++ extension is not built")


def plain(q, k, v, scale):
    """The formula, in the inputs' own precision."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * scale) @ k.mT
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ v).transpose(1, 2)


def results(attend, inputs, upstream, dtype):
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    out = attend(*leaves)
    out.backward(upstream.to(dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def inputs_of(T, H, K, D, dtype, size=1.0):
    generator = torch.Generator().manual_seed(T)
    q, k, v, upstream = (torch.randn(2, T, n, D, generator=generator).to(dtype) for n in (H, K, K, H))
    return [q * size, k * size, v], upstream


def assert_as_exact_as_the_formula(inputs, upstream, scale, dtype):
    s = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    exact = results(lambda q, k, v: plain(q, k, v, s), inputs, upstream, torch.float64)
    formula = results(lambda q, k, v: plain(q, k, v, s), inputs, upstream, dtype)
    ours = results(lambda q, k, v: kernels.attention(q, k, v, scale=scale), inputs, upstream, dtype)
    slack = 1e-3 if dtype == torch.bfloat16 else 2**-23
    for truth, theirs, mine in zip(exact, formula, ours):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + slack * truth.norm()


@needs_passes
@pytest.mark.parametrize("T", [2, 17, 63, 64, 65, 200])
@pytest.mark.parametrize(
    ("H", "K", "D", "scale"), [(2, 2, 64, None), (4, 2, 32, 0.3), (3, 1, 80, None), (1, 1, 16, 1.0)]
)
@FORMATS
def test_fused_attention_is_as_exact_as_the_plain_formula(T, H, K, D, scale, dtype):
    inputs, upstream = inputs_of(T, H, K, D, dtype)
    assert fuses(*inputs)
    assert_as_exact_as_the_formula(inputs, upstream, scale, dtype)


@needs_passes
@FORMATS
def test_fused_attention_exact_at_extreme_weights(dtype):
    """Fused attention stays exact where weights are nearly one or zero."""
    inputs, upstream = inputs_of(130, 2, 2, 64, dtype, size=6.0)
    assert_as_exact_as_the_formula(inputs, upstream, None, dtype)


@needs_passes
@FORMATS
def test_fused_attention_large_scores_cost_no_digits(dtype):
    """Scores of 300, 307, 314 …: a weight of 0.999 has no room for a rounding of its score."""
    (q, k, v), upstream = inputs_of(130, 2, 2, 64, dtype, size=0.0)
    q[..., 0], k[..., 0] = 1.0, (300.0 + 7 * torch.arange(130))[:, None]
    assert_as_exact_as_the_formula([q, k, v], upstream, 1.0, dtype)


@needs_passes
@FORMATS
def test_fused_attention_bits_on_any_threads(dtype):
    """Fused attention gives the same bits on any number of threads."""
    inputs, upstream = inputs_of(150, 6, 2, 32, dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            runs.append(results(kernels.attention, inputs, upstream, dtype))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for one, other in itertools.pairwise(runs) for a, b in zip(one, other))


@needs_passes
def test_fused_attention_serves_what_it_knows():
    q, odd, long = torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 24), torch.zeros(1, LONGEST + 1, 2, 16)
    assert fuses(q, q, q) and fuses(*[q.bfloat16()] * 3)
    assert not fuses(odd, odd, odd) and not fuses(*[q.double()] * 3) and not fuses(q, q.bfloat16(), q)
    assert not fuses(long, long, long) and not fuses(q, long, long)


@FORMATS
def test_strided_inputs_and_gradients(dtype):
    """Strided inputs and gradients are read as they lie."""
    both = torch.randn(2, 70, 6, 16).to(dtype)
    results_of = []
    for copy in (lambda x: x, torch.clone):
        leaf = both.clone().requires_grad_()
        q, k, v = (copy(x) for x in leaf.split((2, 2, 2), dim=-2))
        kernels.attention(q, k, v).transpose(1, 2).sum(-1, keepdim=True).expand(2, 2, 70, 3).sum().backward()
        results_of.append(leaf.grad)
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(results_of))
