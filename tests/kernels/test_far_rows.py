"""Offsets beyond 2³¹ elements, without the memory: rows that lie 2³⁰ apart, of which only the rows are ever touched."""

import pytest
import torch

from warploom import kernels
from warploom.kernels import backend
from warploom.kernels.core.lang import HAS_TRITON, INTERPRET

pytestmark = pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs triton and TRITON_INTERPRET=1")
APART = 1 << 30
"""A stride that 32 bits hold, and whose double they do not."""


def three_rows(*shape, seed=0):
    return torch.randn(3, *shape, generator=torch.manual_seed(seed)).bfloat16()


@pytest.fixture(scope="module")
def far():
    """A tensor with the same rows, far apart."""
    try:
        room = torch.empty(2 * APART + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")

    def spread(near, offset=0):
        strides = APART, *near.stride()[1:]
        return room.as_strided(near.shape, strides, offset).copy_(near)

    return spread


TARGETS = torch.tensor([3, 0, 39])
EXPERTS = [three_rows(32, 16)[:2], three_rows(16, 16, seed=1)[:2]]
CALLS = {
    "cross_entropy": (40, lambda x: kernels.cross_entropy(x, TARGETS, reduction="none")),
    "rms_norm": (64, lambda x: kernels.rms_norm(x, torch.ones(64).bfloat16())),
    "swiglu": (64, lambda x: kernels.swiglu(x, x)),
    "linear": (32, lambda x: kernels.linear(x, three_rows(32, seed=1))),
    "moe": (16, lambda x: kernels.moe(x, three_rows(2, seed=2), *EXPERTS, 1)[0]),
    "attention": (64, lambda x: kernels.attention(*(x.view(1, 3, 4, 16) for _ in range(3)))),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_far_apart_equal_rows_in_line(name, far):
    width, call = CALLS[name]
    near = three_rows(width)
    wide = far(near)
    assert wide.stride(0) * 2 == 1 << 31
    results = []
    for x in (near, wide):
        x = x.detach().requires_grad_()
        with backend("triton"):
            y = call(x)
            results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
