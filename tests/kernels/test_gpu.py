"""What only a GPU can show: nothing waits for it, graphs can hold every op, and 2³¹ elements are not the end."""

import pytest
import torch

from warploom import kernels
from warploom.kernels import backend, ops, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = [op for op in ops() if op.fused is not None]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_no_op_waits_for_the_device(op):
    assert not verify.waits(op)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_a_cuda_graph_holds_every_op_and_replays_its_bits(op):
    assert not verify.replays_otherwise(op)


def test_rows_beyond_two_billion_elements_are_those_of_a_small_tensor():
    rows, width = (1 << 31) // 4096 + 8, 4096
    x = torch.randn(8, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    tall = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    tall[-8:] = x
    with backend("triton"):
        assert torch.equal(kernels.rms_norm(tall, weight)[-8:], kernels.rms_norm(x, weight))
        assert torch.equal(kernels.swiglu(tall, tall)[-8:], kernels.swiglu(x, x))
