"""Attention's Hopper kernel, and what paged attention and the experts promise beyond their cases."""

import pytest
import torch

from warploom.kernels import Maker, attention, attention_hopper, backend, moe, paged_attention
from warploom.kernels.lang import HAS_TRITON, INTERPRET

on_cpu = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (on_cpu and not INTERPRET), reason="needs triton and TRITON_INTERPRET=1 or a GPU"
)
DEVICE = "cpu" if on_cpu else "cuda"
CASES = [case for case in attention.cases if not case.bench]


@pytest.fixture
def hopper(monkeypatch):
    """The Hopper kernel, wherever we are, where the copy engine could address the tensors."""
    if not on_cpu and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU, or none")
    if on_cpu:
        calls = []
        monkeypatch.setattr(attention_hopper, "architecture", lambda device: 90)
        monkeypatch.setattr(attention_hopper, "tile_of", lambda D: {"BLOCK_M": 32, "BLOCK_N": 32})
        monkeypatch.setattr(attention_hopper, "prepare", lambda: calls.append(1))
        return calls
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_hopper_kernel_computes_what_the_portable_one_does(case, hopper, monkeypatch):
    args, options = case.build(Maker(torch.bfloat16, DEVICE))
    with backend("triton"):
        ours = attention(*args, **options)
        monkeypatch.setattr(attention_hopper, "enabled", False)
        portable = attention(*args, **options)
    torch.testing.assert_close(ours.detach(), portable.detach(), atol=2**-7, rtol=2**-7)
    assert not on_cpu or bool(hopper) == (case.name != "head of 256")
