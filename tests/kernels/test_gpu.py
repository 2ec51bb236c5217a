"""What only a GPU can show: nothing waits for it, graphs can hold every op, and 2³¹ elements are not the end."""

import pytest
import torch

from warploom import kernels
from warploom.engine.formats.packed_weight import Layout
from warploom.engine.formats.rounding import nearest
from warploom.kernels import backend, ops
from warploom.kernels.tools import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = [op for op in ops() if op.fused is not None]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_no_op_waits_for_the_device(op):
    assert not verify.synchronizes(op)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_a_cuda_graph_holds_every_op_and_replays_its_bits(op):
    assert not verify.graph_replay_differs(op)


def test_rows_beyond_2_31_elements():
    """Rows beyond two billion elements are those of a small tensor."""
    rows, width = (1 << 31) // 4096 + 8, 4096
    x = torch.randn(8, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    tall = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    tall[-8:] = x
    with backend("triton"):
        assert torch.equal(kernels.rms_norm(tall, weight)[-8:], kernels.rms_norm(x, weight))
        assert torch.equal(kernels.swiglu(tall, tall)[-8:], kernels.swiglu(x, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_row_bits_at_every_batch_size(dtype):
    """Tiles grow with the batch; tensor cores are taken to sum alike in all of them."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(rows, 512, generator=generator, device="cuda").to(dtype) for rows in (4096, 768))
    experts = [
        torch.randn(shape, generator=generator, device="cuda").to(dtype) * 0.05
        for shape in ((8, 512, 512), (8, 512, 256))
    ]
    packed = nearest(weight, Layout(4, minimum=True)).segments[0].to("cuda")
    narrow, squares = weight[:512].contiguous(), x.float().square().unflatten(-1, (-1, 64)).sum(-1)
    with backend("triton"):
        for product in (
            lambda rows: kernels.linear(rows, weight),
            lambda rows: packed.multiply(rows, None),
            lambda rows: kernels.packed_normed_linear(rows, squares[: len(rows)], packed.tensor),
            lambda rows: kernels.normed_linear(rows, squares[: len(rows)], weight),
            lambda rows: kernels.linear_residual(rows, narrow, rows.clone(), weight[0], None)[0],
            lambda rows: kernels.linear_residual(rows, narrow, rows.clone(), weight[0], None)[1],
            lambda rows: kernels.moe(rows, rows[:, :8].contiguous(), *experts, 2)[0],
        ):
            whole = product(x)
            assert all(torch.equal(product(x[:size]), whole[:size]) for size in (1, 16, 17, 256, 257, 1000))


def test_inductor_runs_attention_experts_and_norm_as_eager_does():
    """Inductor makes its own launches of the kernels, tensor descriptors included, and sets an allocator of its own."""
    maker = kernels.Maker(torch.bfloat16, "cuda")
    x, weight = maker.normal(2, 256, 512), maker.normal(512)
    experts = maker.normal(8, 512, 512, scale=0.05), maker.normal(8, 512, 256, scale=0.05)

    def run(x, weight, up, down):
        heads = kernels.rms_norm(x, weight).unflatten(-1, (4, 128))
        y = kernels.attention(heads, heads, heads).flatten(-2)
        return kernels.moe(y, y[..., :8].float(), up, down, 2)[0].float().square().mean()

    wanted = [x, weight, *experts]
    with backend("triton"):
        losses = [function(*wanted) for function in (run, torch.compile(run, backend="inductor", fullgraph=True))]
        ours, compiled = (torch.autograd.grad(loss, wanted) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-5)
    for mine, theirs in zip(compiled, ours):
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2 * theirs.abs().max().item())
