"""Every fused twin against the float64 oracle, forward and backward, in the Triton interpreter or on a GPU."""

import pytest
import torch

from warploom.kernels import Maker, backend, verify
from warploom.kernels.lang import HAS_TRITON, INTERPRET

from .test_oracles import small_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRET), reason="needs triton and TRITON_INTERPRET=1 or a GPU"
)


def fused_cases():
    return small_cases(lambda op, case: op.fused is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@fused_cases()
def test_errors_are_at_most_twice_those_of_eager(op, case, dtype):
    assert not verify.errors(op, case, dtype, DEVICE)


@small_cases(lambda op, case: op.fused is not None and case is op.cases[0])
def test_so_they_are_in_float16(op, case):
    assert not verify.errors(op, case, torch.float16, DEVICE)


@fused_cases()
def test_the_same_call_gives_the_same_bits(op, case):
    with backend("triton"):
        first, second = (verify.call(op, case, op, Maker(torch.bfloat16, DEVICE)) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]]):
        assert torch.equal(a, b)


def test_a_wrong_twin_is_caught():
    from warploom.kernels import rms_norm

    case = rms_norm.cases[0]
    right = rms_norm.fused
    try:
        rms_norm.fused = lambda x, weight, eps=1e-6: right(x, weight, eps) * 1.001
        found = verify.errors(rms_norm, case, torch.float32, DEVICE)
    finally:
        rms_norm.fused = right
    assert [text.split(":")[0] for text in found] == ["result 0", "gradient 0", "gradient 1"]
