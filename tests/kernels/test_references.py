"""The references against oracles that are not ours: PyTorch's own losses and optimizer, and `transformers`."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from warploom import kernels
from warploom.kernels import backend, softmax
from warploom.kernels.core.philox import random_bits


@pytest.fixture(autouse=True)
def _eager():
    torch.manual_seed(0)
    with backend("eager"):
        yield


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 0.5,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda s: s["rope_type"],
)
def test_rope_tables_are_those_of_transformers(scaling):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    original = scaling.get("original_max_position_embeddings", 256)
    config = llama.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=original if scaling["rope_type"] == "dynamic" else 256,
        rope_parameters={"rope_theta": 10_000.0, **scaling},
    )
    theirs = llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1, 256, 64), torch.arange(256)[None])
    ours = kernels.rope_tables(32, 256, 10_000.0, scaling)
    torch.testing.assert_close(ours[0], cos[0, :, :16], atol=2e-6, rtol=0)
    torch.testing.assert_close(ours[1], sin[0, :, :16], atol=2e-6, rtol=0)
    q, k = torch.randn(1, 256, 2, 32), torch.randn(1, 256, 1, 32)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(kernels.rope(q, k, *ours), expected, atol=1e-5, rtol=0)


def test_interleaved_rope_is_the_complex_product():
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    cos, sin = (t.double() for t in kernels.rope_tables(8, 6))
    turned = torch.view_as_complex(q.view(1, 6, 2, 4, 2)) * torch.complex(cos, sin)[None, :, None]
    ours, _ = kernels.rope(q, q, cos, sin, interleaved=True)
    torch.testing.assert_close(ours, torch.view_as_real(turned).flatten(-2))


def test_cross_entropy_is_that_of_pytorch():
    logits, targets = torch.randn(9, 31, dtype=torch.float64), torch.randint(0, 31, (9,))
    targets[4] = -100
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1)
        ours = kernels.cross_entropy(logits, targets, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(ours, expected)
    z = kernels.cross_entropy(logits, targets, z_loss=0.5) - kernels.cross_entropy(logits, targets)
    torch.testing.assert_close(z, 0.5 * logits.logsumexp(-1)[targets >= 0].square().mean())


def test_linear_cross_entropy_chunks_equal_one(monkeypatch):
    """Linear cross entropy in many chunks is that in one."""
    module = importlib.import_module("warploom.kernels.linear_cross_entropy")
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 19, (23,))
    whole = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), targets), (hidden, weight))
    monkeypatch.setattr(module, "rows_per_slab", lambda V: 5)
    ours = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}, {"scale": 0.2}], ids=str)
def test_attention_is_softmax_of_scores_times_values(options):
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((5, 4), (9, 2), (9, 2)))
    expected = torch.zeros_like(q)
    for b in range(2):
        for t in range(5):
            for h in range(4):
                here = t + 4  # queries are the last five of nine positions
                last = here if options.get("causal", True) else 8
                first = max(0, here - options.get("window", 99) + 1)
                scores = k[b, first : last + 1, h // 2] @ q[b, t, h] * options.get("scale", 8**-0.5)
                expected[b, t, h] = softmax(scores) @ v[b, first : last + 1, h // 2]
    torch.testing.assert_close(kernels.attention(q, k, v, **options), expected)
    torch.testing.assert_close(kernels.attention.reference(q, k, v, **options), expected)


def test_a_query_without_keys_gets_zeros():
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
    assert torch.equal(kernels.attention(q, k, k)[:, :2], torch.zeros(1, 2, 1, 8))


def test_paged_attention_equals_attention():
    """Paged attention is attention over what was written."""
    K, D, page = 2, 16, 4
    k_pages, v_pages = torch.zeros(2, 9, page, K, D)
    table = torch.tensor([[3, 5, 1], [2, 8, 0]], dtype=torch.int32)
    k, v = torch.randn(10, K, D), torch.randn(10, K, D)
    slots = torch.tensor([table[0, t // page] * page + t % page for t in range(10)])
    kernels.write_pages(k, v, k_pages, v_pages, slots)
    q = torch.randn(6, 4, D)
    lens = torch.tensor([10, 0], dtype=torch.int32), torch.tensor([6, 0], dtype=torch.int32)
    ours = kernels.paged_attention(q, k_pages, v_pages, table, *lens)
    torch.testing.assert_close(ours, kernels.attention(q[None], k[None], v[None])[0])


def test_experts_of_mixtral_give_the_same_output():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    block = mixtral.MixtralSparseMoeBlock(config)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 7, 16)
    expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    logits = F.linear(x, block.gate.weight)
    y, aux = kernels.moe(x, logits, block.experts.gate_up_proj, block.experts.down_proj, 2)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert aux.tokens_per_expert.sum() == 14


def test_balance_loss_even_is_1_collapsed_is_E():
    """An even load costs one and a collapsed one costs the number of experts."""
    x, up, down = torch.randn(8, 4), torch.randn(4, 6, 4), torch.randn(4, 4, 3)
    even = kernels.moe(x, 50.0 * F.one_hot(torch.arange(8) % 4, 4), up, down, 1)[1]
    collapsed = kernels.moe(x, 50.0 * F.one_hot(torch.zeros(8, dtype=torch.long), 4), up, down, 1)[1]
    assert even.load_balance.item() == pytest.approx(1.0)
    assert collapsed.load_balance.item() == pytest.approx(4.0)


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    full = [torch.full((rows,), x) for x in (temperature, top_k, top_p, min_p)]
    return *full, torch.full((rows,), 42), torch.arange(rows)


def test_philox_gives_the_published_numbers():
    # The known-answer vector of Random123 for an all-zero key and counter.
    words = random_bits(torch.tensor([0]), torch.tensor([0]), 4)[0]
    assert [hex(w) for w in words.tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_samples_follow_distribution():
    """Samples follow the distribution that was asked for."""
    logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.0, -1.0])
    rows = 20_000
    for options in ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}):
        temperature = options.get("temperature", 1.0)
        p = torch.softmax(logits / temperature, -1)
        kept = torch.ones(6, dtype=torch.bool)
        kept[options.get("top_k", 6) :] = False
        kept &= p.cumsum(0) - p < options.get("top_p", 1.0)
        kept &= p >= options.get("min_p", 0.0) * p.max()
        p = p * kept / (p * kept).sum()
        drawn = kernels.sample(logits.expand(rows, 6), *settings(rows, **options)).bincount(minlength=6) / rows
        assert (drawn - p).abs().max() < 4 * math.sqrt(0.25 / rows)
        assert drawn[~kept].sum() == 0


def test_a_sample_depends_on_its_own_row_only():
    logits = torch.randn(5, 300)
    args = settings(5, 1.1, 40, 0.9)
    together = kernels.sample(logits, *args)
    alone = torch.cat([kernels.sample(logits[i : i + 1], *(x[i : i + 1] for x in args)) for i in range(5)])
    assert torch.equal(together, alone)


def test_adamw_walks_with_that_of_pytorch():
    ours = torch.randn(40, 3)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    m, v = torch.zeros(2, 40, 3)
    for step in range(1, 6):
        grad = torch.randn(40, 3)
        theirs.grad = grad * 0.5
        optimizer.step()
        kernels.adamw_step(ours, grad, m, v, 0.01, step, weight_decay=0.1, grad_scale=torch.tensor(0.5))
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_stochastic_rounding_keeps_the_mean():
    from warploom.kernels.adamw import round_stochastically

    x = torch.full((40_000,), 1.0 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    rounded = round_stochastically(x, seed=3, step=7)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((rounded == 1.0).float().mean().item() - 0.75) < 0.01


def test_arguments_may_be_named():
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(kernels.rms_norm(x=x, weight=weight, eps=1e-5), kernels.rms_norm(x, weight, 1e-5))
    with pytest.raises(ValueError, match="rms_norm got no tensor; it needs x, weight, eps"):
        kernels.rms_norm()


def test_mistakes_are_named():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        kernels.attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match="backend is 'cuda'"), backend("cuda"):
        pass
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        kernels.cross_entropy(q, torch.zeros(1, 2, 3, dtype=torch.long), reduction="avg")
    with pytest.raises(ValueError, match="top_k is 9 with 4 experts"):
        kernels.moe(torch.randn(2, 4), torch.randn(2, 4), torch.randn(4, 4, 4), torch.randn(4, 4, 2), 9)
    with pytest.raises(ValueError, match="'low_freq_factor'"):
        kernels.rope_tables(8, 4, 1e4, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64})
