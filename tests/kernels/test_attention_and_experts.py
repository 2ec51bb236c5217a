"""Attention's Hopper kernel, and what paged attention and the experts promise beyond their cases."""

import contextlib

import pytest
import torch

from warploom.kernels import Maker, attention, backend, moe, paged_attention
from warploom.kernels.core.lang import HAS_TRITON, INTERPRET
from warploom.kernels.core.tuned import trying
from warploom.kernels.gpu import attention_hopper, attention_launch
from warploom.kernels.tools import verify

on_cpu = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (on_cpu and not INTERPRET), reason="needs triton and TRITON_INTERPRET=1 or a GPU"
)
DEVICE = "cpu" if on_cpu else "cuda"
CASES = [case for case in attention.cases if not case.bench]


@pytest.fixture
def hopper(monkeypatch):
    """Loads by descriptor, wherever the copy engine could address the tensors; yields by which kernels."""
    if not on_cpu and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU, or none")
    asked = []
    if on_cpu:
        tile = {"BLOCK_M": 32, "BLOCK_N": 32}
        monkeypatch.setattr(attention_hopper, "architecture", lambda device: 90)
        monkeypatch.setattr(
            attention_hopper, "tile_of", lambda kernel, *_: asked.append(kernel) or tile | {"TMA": True}
        )
        monkeypatch.setattr(attention_launch, "tile_of", lambda *_: tile | {"TMA": False})
    return asked


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loads_by_descriptor_equal_pointers(case, hopper, monkeypatch):
    """One arithmetic: with the same tiles, interpreted, the same bits."""
    with backend("triton"):
        ours, grads = verify.call(attention, case, attention, Maker(torch.bfloat16, DEVICE))
    expected = ["forward", "dq", "dkdv"] if grads else ["forward"]
    assert not on_cpu or hopper == ([] if case.name == "head of 256" else expected)
    monkeypatch.setattr(attention_hopper, "hopper_kernels", set())
    with backend("triton"):
        portable, portable_grads = verify.call(attention, case, attention, Maker(torch.bfloat16, DEVICE))
    for mine, theirs in zip(ours + grads, portable + portable_grads):
        size = max(1.0, theirs.abs().max().item())
        within = 0 if on_cpu else 2**-7
        torch.testing.assert_close(mine / size, theirs / size, atol=within, rtol=within)


def test_attention_1023_of_1024_keys():
    """A length of 1023 over 1024 keys is no special case."""
    q, k, v, do = (Maker(torch.float32, DEVICE, seed=i).normal(1, 1023 + (i in (1, 2)), 1, 16) for i in range(4))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = attention.reference(*doubles)
    with contextlib.ExitStack() as stack, backend("triton"):
        for kernel in ("forward", "dq", "dkdv") if on_cpu else ():  # few large tiles: the interpreter pays by the tile
            stack.enter_context(trying(f"attention_{kernel}", {"BLOCK_M": 256, "BLOCK_N": 256}))
        ours = attention(q, k, v)
        grads = torch.autograd.grad(ours, (q, k, v), do.detach())
    torch.testing.assert_close(ours.double(), exact, atol=2e-6, rtol=1e-5)
    for mine, true in zip(grads, torch.autograd.grad(exact, doubles, do.detach().double())):
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)


def pages_of(contexts, K=2, D=16, page=4, width=None):
    """A cache for these sequences, and the page table that finds it."""
    m = Maker(torch.bfloat16, DEVICE)
    width = width or max(-(-c // page) for c in contexts)
    table = torch.arange(len(contexts) * width, dtype=torch.int32).flip(0).view(len(contexts), width).to(DEVICE)
    return *(m.normal(len(contexts) * width, page, K, D, grad=False) for _ in range(2)), table


def test_sequence_bits_alone_and_in_any_batch():
    """A sequence gets the same bits alone and in any batch."""
    contexts, queries = [700, 33, 5, 300], [1, 9, 1, 0]
    k_pages, v_pages, table = pages_of(contexts)
    lens = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (contexts, queries)]
    q = Maker(torch.bfloat16, DEVICE, seed=1).normal(sum(queries) + 2, 4, 16, grad=False)
    with backend("triton"):
        together = paged_attention(q, k_pages, v_pages, table, *lens)
        start = 0
        for i, (context, n) in enumerate(zip(contexts, queries)):
            own = slice(i, i + 1)
            pages = table[own, : -(-context // 4)]
            alone = paged_attention(q[start : start + n], k_pages, v_pages, pages, lens[0][own], lens[1][own])
            assert torch.equal(alone, together[start : start + n])
            start += n
    assert not together[start:].any()


@pytest.mark.parametrize("tokens", [0, 5], ids=["no tokens", "most experts empty"])
def test_experts_not_chosen_cost_nothing(tokens):
    """Experts nobody chose cost nothing and get no gradient."""
    m = Maker(torch.float32, DEVICE)
    logits = torch.zeros(tokens, 8, device=DEVICE)
    logits[:, 6] = 3.0
    x, up, down = m.normal(tokens, 16), m.normal(8, 16, 16), m.normal(8, 16, 8)
    with backend("triton"):
        y, aux = moe(x, logits, up, down, 1)
        y.sum().backward()
    assert aux.tokens_per_expert.tolist() == [0] * 6 + [tokens, 0]
    assert y.shape == (tokens, 16)
    for weight in (up, down):
        assert not weight.grad[:6].any() and not weight.grad[7].any()
        assert bool(weight.grad[6].any()) == (tokens > 0)


def test_autocast_experts_low_router_full():
    """Under autocast experts multiply in its precision and route in full."""
    m = Maker(torch.float32, DEVICE)
    x, logits, up, down = m.normal(6, 16), m.normal(6, 4), m.normal(4, 16, 16), m.normal(4, 16, 8)
    with backend("triton"):
        low = [t.detach().bfloat16() for t in (x, up, down)]
        expected, _ = moe(low[0], logits.detach(), low[1], low[2], 2)
        with torch.autocast(DEVICE, torch.bfloat16):
            y, _ = moe(x, logits, up, down, 2)
        y.sum().backward()
    assert y.dtype == torch.float32 and torch.equal(y.detach(), expected.float())
    assert x.grad.dtype == up.grad.dtype == logits.grad.dtype == torch.float32
