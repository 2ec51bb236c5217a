"""What only a GPU can show: nothing waits for it, graphs can hold every op, and 2³¹ elements are not the end."""

import pytest
import torch

from warploom import kernels
from warploom.kernels import Maker, backend, ops
from warploom.kernels.verify import call, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = [op for op in ops() if op.fused is not None]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_no_op_waits_for_the_device(op):
    with backend("triton"):
        call(op, op.cases[0], op, Maker(torch.bfloat16, "cuda"))  # compiled now, which may wait
        args, options = op.cases[0].build(Maker(torch.bfloat16, "cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [x for x in tensors(op(*args, **options)) if x.requires_grad]
            wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
            if results and wanted:
                torch.autograd.grad(results, wanted, [torch.ones_like(x) for x in results])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_a_cuda_graph_holds_every_op_and_replays_its_bits(op):
    with backend("triton"), torch.no_grad():
        args, options = op.cases[0].build(Maker(torch.bfloat16, "cuda"))
        kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        expected = tensors(op(*args, **options)) + [x for x in args if isinstance(x, torch.Tensor)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = tensors(op(*kept, **options))
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(results + [x for x in kept if isinstance(x, torch.Tensor)], expected):
            assert torch.equal(a, b)


def test_rows_beyond_two_billion_elements_are_those_of_a_small_tensor():
    rows, width = (1 << 31) // 4096 + 8, 4096
    x = torch.randn(8, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    tall = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    tall[-8:] = x
    with backend("triton"):
        assert torch.equal(kernels.rms_norm(tall, weight)[-8:], kernels.rms_norm(x, weight))
        assert torch.equal(kernels.swiglu(tall, tall)[-8:], kernels.swiglu(x, x))
