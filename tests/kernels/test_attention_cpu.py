"""The staircase is attention: checked against float64, allowed twice the error of the plain formula in bfloat16."""

import itertools

import pytest
import torch

from warploom import kernels
from warploom.kernels.attention_cpu import BLOCK, LONGEST, serves


def plain(q, k, v, scale):
    """The formula, in the inputs' own precision."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * scale) @ k.mT
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ v).transpose(1, 2)


def results(attend, inputs, upstream, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = attend(*leaves)
    out.backward(upstream.to(dtype))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("T", [2, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize(("H", "K", "scale"), [(2, 2, None), (4, 2, 0.3), (3, 1, None)])
def test_staircase_attention_is_as_exact_as_the_plain_formula(T, H, K, scale):
    generator = torch.Generator().manual_seed(T)
    sizes = ((2, T, H, 32), (2, T, K, 32), (2, T, K, 32), (2, T, H, 32))
    *inputs, upstream = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    assert serves(inputs[0].clone().requires_grad_(), inputs[1])
    s = 32**-0.5 if scale is None else scale
    exact = results(lambda q, k, v: plain(q, k, v, s), inputs, upstream, torch.float64)
    formula = results(lambda q, k, v: plain(q, k, v, s), inputs, upstream, torch.bfloat16)
    ours = results(lambda q, k, v: kernels.attention(q, k, v, scale=scale), inputs, upstream, torch.bfloat16)
    for truth, theirs, mine in zip(exact, formula, ours):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-3 * truth.norm()


def test_it_serves_only_what_it_was_made_for():
    q = torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16)
    assert not serves(q, q)  # no gradient is wanted
    q.requires_grad_()
    assert serves(q, q)
    long = torch.zeros(1, LONGEST + 1, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    assert not serves(long, long) and not serves(q.float(), q.float()) and not serves(q, long)
    with torch.no_grad():
        assert not serves(q, q)


def test_strided_inputs_and_gradients_are_read_as_they_lie():
    both = torch.randn(2, 70, 6, 16).bfloat16()
    results_of = []
    for copy in (lambda x: x, torch.clone):
        leaf = both.clone().requires_grad_()
        q, k, v = (copy(x) for x in leaf.split((2, 2, 2), dim=-2))
        kernels.attention(q, k, v).transpose(1, 2).sum(-1, keepdim=True).expand(2, 2, 70, 3).sum().backward()
        results_of.append(leaf.grad)
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(results_of))
