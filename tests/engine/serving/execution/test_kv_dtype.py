"""Claims about keys and values in formats narrower than the model's."""

import random

import numpy as np
import pytest
import torch

from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution.gpu_model import fused_model
from warploom.engine.serving.execution.kv_cache import (
    HAS_NATIVE,
    TILE,
    AttentionMetadata,
    KernelAttention,
    NativeAttend,
    PagedKVCache,
    to_device,
)
from warploom.kernels import hadamard, write_pages

NEEDS_NATIVE = pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")


class Layer:
    """What `attend` asks of a layer."""

    def __init__(self, head_dim, window=None, softcap=None, sinks=None):
        self.index, self.window, self.softcap, self.scale = 1, window, softcap, head_dim**-0.5
        self.sinks = sinks


def store_of(K, D, page_size, dtype=torch.int8):
    """Pages of two layers, twenty each."""

    class Shape:
        n_layers, kv_heads, head_size = 2, K, D

        def kv_bytes_per_token(size, latent):
            return 2 * 2 * K * D * size

    store = PagedKVCache(Shape, 20, page_size, dtype, torch.device("cpu"))
    page = PagedKVCache.bytes_per_page(Shape, page_size, dtype, torch.device("cpu"))
    assert page == sum(part[:, 0].nbytes for part in store.parts)
    return store


def untiled(tiles, D):
    """The numbers (P, page, K, D) and scales (P, K, page) of C++'s pages of keys, then of values."""
    numbers, scales = tiles[..., : TILE * D], tiles[..., TILE * D :].view(torch.float32)
    as_keys = (numbers ^ 128).unflatten(-1, (-1, TILE, 4)).transpose(-3, -2).flatten(-2)
    as_values = numbers.unflatten(-1, (TILE // 4, -1, 4)).transpose(-2, -1).flatten(-3, -2)
    return [
        (x.contiguous().view(torch.int8).transpose(2, 3).flatten(1, 2), scales.transpose(1, 2).flatten(2))
        for x in (as_keys, as_values)
    ]


def ragged_step(page_size) -> AttentionMetadata:
    """Chunks and decodes of four sequences, in pages out of order, and two tokens of padding."""
    counts, contexts = np.array([1, 7, 1, 20], dtype=np.int32), [33, 9, 1, 50]
    table = np.random.default_rng(0).permutation(20)[:16].reshape(4, 4).astype(np.int32)
    positions = np.concatenate([*(np.arange(c - n, c) for c, n in zip(contexts, counts)), [0, 0]])
    return PagedKVCache.layout(type("Sizes", (), {"page_size": page_size}), table, np.arange(4), positions, counts)


@NEEDS_NATIVE
@pytest.mark.parametrize(("H", "K", "D", "page_size"), [(4, 2, 32, 16), (3, 3, 24, 32), (8, 1, 64, 16), (6, 2, 80, 48)])
@pytest.mark.parametrize("limits", [{}, {"window": 6, "softcap": 3.0}, {"window": 18, "sinks": torch.arange(8.0) - 2}])
def test_cpp_int8_pages_equal_reference(H, K, D, page_size, limits, monkeypatch):
    """C++ writes the bytes and scales of `kernels.write_pages` and sees what they stand for."""
    torch.manual_seed(0)
    wide = -(-D // 16) * 16  # C++ fills heads up with zeros
    limits = {name: value[:H] if name == "sinks" else value for name, value in limits.items()}
    layout = ragged_step(page_size)
    tiled = store_of(K, D, page_size)
    monkeypatch.setattr("warploom.engine.serving.execution.kv_cache.HAS_NATIVE", False)
    plain = store_of(K, wide, page_size)
    keys, values = (torch.randn(20 * page_size, K, D) for _ in "kv")
    values[::7, :, 3] *= 50  # one large number costs only its own token precision
    whole = np.array([20 * page_size], dtype=np.int32)
    table = np.arange(20, dtype=np.int32)[None]
    before = PagedKVCache.layout(tiled, table, np.arange(1), np.arange(20 * page_size), whole)
    q, k, v = (torch.randn(1, len(layout.positions), heads, D) for heads in (H, K, K))
    outputs = []
    for store, kind, width in ((tiled, NativeAttend, D), (plain, KernelAttention, wide)):
        for step, (queries, *pair) in (
            (before, (keys.repeat(1, H // K, 1)[None], keys[None], values[None])),
            (layout, (q, k, v)),
        ):
            attend = store.attend(step, to_device(step.arrays(), torch.device("cpu")))
            assert type(attend) is kind
            padded = [torch.nn.functional.pad(x, (0, width - D)) for x in (queries, *pair)]
            out = attend(*padded, Layer(D, **limits))
        outputs.append(out[:, :-2, :, :D])
    tiles = untiled(tiled.keys[1], wide)[0], untiled(tiled.values[1], wide)[1]
    for (numbers, scales), pages, ours in zip(tiles, (plain.keys, plain.values), plain.scales):
        assert torch.equal(numbers, pages[1]) and torch.equal(scales, ours[1])
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=3e-4)  # queries and weights in 16 bits


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize(
    ("dtype", "least", "step"), [(torch.int8, 1 / 254, 0), (torch.float8_e4m3fn, 2**-10 / 448, 2**-4)]
)
def test_pages_of_8_bits_round_to_nearest(width, dtype, least, step):
    """Each number of a value, and of a key's rotation: by half a step at most, of float8 a step of its own size."""
    torch.manual_seed(0)
    k, v = (torch.randn(64, 3, width) * torch.logspace(-6, 3, 64)[:, None, None] for _ in "kv")
    pages = [torch.zeros(4, 16, 3, width, dtype=dtype) for _ in "kv"]
    scales = [torch.zeros(4, 3, 16) for _ in "kv"]
    slots = torch.randperm(64)
    write_pages(k, v, *pages, slots, *scales)
    for true, numbers, scale in zip((hadamard(k), v), pages, scales):
        kept = (numbers.float() * scale.transpose(1, 2)[..., None]).flatten(0, 1)[slots]
        bound = torch.maximum(true.abs().amax(-1, keepdim=True) * least, true.abs() * step)
        assert ((kept - true).abs() <= 1.001 * bound).all()


@pytest.mark.parametrize("width", [16, 48, 64, 80, 128, 320])
def test_hadamard_of_a_head_is_orthogonal(width):
    """Blocks of powers of two, the largest first; turned and turned back, a head is itself, and products stay."""
    blocks = {16: [16], 48: [32, 16], 64: [64], 80: [64, 16], 128: [128], 320: [256, 64]}[width]
    turn = torch.block_diag(*map(sylvester, blocks))
    a, b = torch.randn(2, 5, width, dtype=torch.float64)
    there, back = hadamard(a), hadamard(b, back=True)
    torch.testing.assert_close((there * back).sum(-1), (a * b).sum(-1))
    torch.testing.assert_close(hadamard(there, back=True), a)
    stretch = torch.cat([torch.full((n,), 2 ** (0.5 * (n.bit_length() % 2 == 0))) for n in blocks]).double()
    torch.testing.assert_close(there, a @ turn.double() * stretch)


def sylvester(n):
    """The orthonormal Hadamard matrix by its definition."""
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float32) / n**0.5


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])  # a mixture may choose another expert
def test_int8_kv_costs_two_bf16_roundings(tiny_model, shape):
    """Log-probabilities against float32: of 8-bit pages, and of the model in bfloat16."""
    model, text = tiny_model(shape, vocab_size=500), [i * i % 487 for i in range(250)]
    exact, halves, eight = (
        torch.tensor(llm.score(text)) for llm in (LLM(model), LLM(model, dtype="bfloat16"), LLM(model, kv_dtype="int8"))
    )
    assert 0 < (eight - exact).norm() < 2 * (halves - exact).norm()


@NEEDS_NATIVE
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 24}])
def test_int8_pages_batch_invariant(tiny_model, changes):
    """In a batch, after a prefix hit, in small chunks with preemption, and behind a draft model."""
    draw = random.Random(0)
    prompts = [[draw.randrange(97) for _ in range(draw.randrange(1, 60))] for _ in range(16)]
    params = [SamplingParams(16, 0.9, seed=i, logprobs=0, ignore_eos=True) for i in range(16)]
    model = tiny_model(**changes)

    def said(llm):
        return [(o.token_ids, [entry.logprob for entry in o.logprobs]) for o in llm.generate(prompts, params)]

    llm = LLM(model, kv_dtype="int8")
    together = said(llm)
    assert said(llm) == together, "after a prefix hit"
    memory = 8 * PagedKVCache.bytes_per_page(model.config, 16, torch.int8, torch.device("cpu"))
    small = LLM(model, kv_dtype="int8", max_batch_tokens=7, max_batch=5, kv_memory=memory)
    assert said(small) == together, "in chunks"
    assert small.engine.scheduler.preemptions > 0
    guessed = LLM(model, kv_dtype="int8", draft_model=tiny_model(seed=1, **changes))
    assert said(guessed) == together, "with a draft"


@NEEDS_NATIVE
def test_kv_dtype_follows_quantize(tiny_model):
    """8 bit weights bring 8 bit pages unless another format is asked for."""
    model = tiny_model(dtype=torch.bfloat16, head_dim=64)
    memory = 4 * 16 * model.config.kv_bytes_per_token(2)
    pages = {}
    for kv_dtype in (None, "bfloat16", "float32"):
        llm = LLM(model, quantize="int8", kv_dtype=kv_dtype, kv_memory=memory)
        pages[llm.engine.runner.store.dtype] = len(llm.engine.runner.store.keys[0])
        assert len(llm.generate([1, 2, 3], SamplingParams(4, ignore_eos=True)).token_ids) == 4
    assert pages == {torch.int8: 7, torch.bfloat16: 4, torch.float32: 2}
    assert LLM(model, quantize="int8", page_size=8).engine.runner.store.dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("kv_dtype", "digits"), [("fp8", 5), ("int8", 1)])
def test_pages_of_8_bits_serve_by_kernels(tiny_model, kv_dtype, digits, quantize, monkeypatch):
    """Without C++, in few pages with preemption, after a prefix hit and in a GPU's fixed buffers."""
    model, text = tiny_model(), [i * i % 89 for i in range(100)]
    formats = "float32", "bfloat16", kv_dtype
    monkeypatch.setattr("warploom.engine.serving.execution.kv_cache.HAS_NATIVE", False)
    monkeypatch.setattr("warploom.engine.serving.llm.HAS_NATIVE", False)
    llms = [LLM(model, kv_dtype=name, quantize=quantize, max_batch=3) for name in formats]
    scores = [torch.tensor(llm.score(text)) for llm in llms]
    by_half, by_eight = ((score - scores[0]).norm() for score in scores[1:])
    assert 0 < by_eight < 2 * 2**digits * by_half, "as many binary digits fewer"
    prompts = [text[:9], text[:30], text[5:7], *(text[i : i + 14] for i in range(20, 24))]
    params = SamplingParams(8, temperature=0, ignore_eos=True)
    expected = [output.token_ids for output in llms[-1].generate(prompts, params)]
    assert [output.token_ids for output in llms[-1].generate(prompts, params)] == expected, "after a prefix hit"
    store = llms[-1].engine.runner.store
    assert len(store.scales) == 2
    page = PagedKVCache.bytes_per_page(model.config, 16, store.dtype, torch.device("cpu"))
    small = LLM(model, kv_dtype=kv_dtype, quantize=quantize, max_batch_tokens=7, max_batch=5, kv_memory=5 * page)
    assert small.engine.runner.store.keys.shape[1] == 5
    assert [output.token_ids for output in small.generate(prompts, params)] == expected, "in chunks"
    assert small.engine.scheduler.preemptions > 0
    if quantize is None:
        runner = llms[-1].engine.runner
        runner.model, runner.least_tokens = fused_model(model, None), 1
        runner.record_graphs(lambda run: run)
        assert [output.token_ids for output in llms[-1].generate(prompts, params)] == expected
        assert runner.graphs.replays


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_dtype": "int4"}, "kv_dtype must be None or one of .*int8, fp8, got 'int4'"),
        ({"kv_dtype": "int8", "page_size": 8}, "page_size must be a multiple of 16 with kv_dtype='int8', got 8"),
    ],
)
def test_a_format_that_cannot_be_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(model, **options)
