"""Claims about keys and values in formats narrower than the model's."""

import random

import numpy as np
import pytest
import torch

from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution import int8_pages
from warploom.engine.serving.execution.gpu_model import fused_model
from warploom.engine.serving.execution.kv_cache import (
    HAS_NATIVE,
    AttentionMetadata,
    NativeAttend,
    PagedKVCache,
    to_device,
)

NEEDS_NATIVE = pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")


class Layer:
    """What `attend` asks of a layer."""

    def __init__(self, head_dim, window=None, softcap=None, sinks=None):
        self.index, self.window, self.softcap, self.scale = 1, window, softcap, head_dim**-0.5
        self.sinks = sinks


def filled_store(K, D, page_size, keys, values):
    """A store whose second layer holds keys and values in every place, written by the twin."""

    class Shape:
        n_layers, kv_heads, head_size = 2, K, D

    store = PagedKVCache(Shape, len(keys) // page_size, page_size, torch.int8, torch.device("cpu"))
    everywhere = torch.arange(len(keys))
    int8_pages.write(keys, store.keys[1], everywhere, keys=True)
    int8_pages.write(values, store.values[1], everywhere, keys=False)
    return store


def ragged_step(page_size) -> AttentionMetadata:
    """Chunks and decodes of four sequences, in pages out of order, and two tokens of padding."""
    counts, contexts = np.array([1, 7, 1, 20], dtype=np.int32), [33, 9, 1, 50]
    table = np.random.default_rng(0).permutation(20)[:16].reshape(4, 4).astype(np.int32)
    positions = np.concatenate([*(np.arange(c - n, c) for c, n in zip(contexts, counts)), [0, 0]])
    return PagedKVCache.layout(type("Sizes", (), {"page_size": page_size}), table, np.arange(4), positions, counts)


@NEEDS_NATIVE
@pytest.mark.parametrize(("H", "K", "D", "page_size"), [(4, 2, 32, 16), (3, 3, 24, 32), (8, 1, 64, 16), (6, 2, 80, 48)])
@pytest.mark.parametrize("limits", [{}, {"window": 6, "softcap": 3.0}, {"window": 18, "sinks": torch.arange(8.0) - 2}])
def test_cpp_int8_pages_equal_twin(H, K, D, page_size, limits):
    """Cpp writes the twins bytes and sees what they stand for."""
    torch.manual_seed(0)
    keys, values = torch.randn(20 * page_size, K, D), torch.randn(20 * page_size, K, D)
    values[::7, :, 3] *= 50  # one large number costs only its own token precision
    limits = {name: value[:H] if name == "sinks" else value for name, value in limits.items()}
    layout = ragged_step(page_size)
    q, k, v = (torch.randn(1, len(layout.positions), heads, D) for heads in (H, K, K))
    outputs, stores = [], [filled_store(K, D, page_size, keys, values) for _ in range(2)]
    stores[1].layers = None
    for store, kind in zip(stores, (NativeAttend, int8_pages.Int8Attend)):
        attend = store.attend(layout, to_device(layout.arrays(), torch.device("cpu")))
        assert type(attend) is kind
        outputs.append(attend(q, k, v, Layer(D, **limits))[:, :-2])
    assert torch.equal(stores[0].keys, stores[1].keys) and torch.equal(stores[0].values, stores[1].values)
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=3e-4)  # queries and weights in 16 bits


@pytest.mark.parametrize(("keys", "width"), [(True, 64), (False, 40)])
def test_int8_pages_error_within_half_step(keys, width):
    """Of a key, no number of its rotation."""
    torch.manual_seed(0)
    turn = sylvester(width) if keys else torch.eye(width)
    x_TKD = torch.randn(64, 3, width) * torch.logspace(-6, 3, 64)[:, None, None]
    pages = torch.zeros(2, 2, 3, int8_pages.tile_bytes(width), dtype=torch.uint8)
    slots = torch.randperm(64)
    int8_pages.write(x_TKD, pages, slots, keys=keys)
    kept_TKD = int8_pages.read(pages, width, keys=keys).flatten(0, 1)[slots]
    step_TK = (x_TKD @ turn).abs().amax(-1) / 127
    assert (((kept_TKD - x_TKD) @ turn).abs().amax(-1) <= 0.501 * step_TK).all()


@pytest.mark.parametrize("width", [16, 48, 64, 80, 128, 320])
def test_hadamard_of_a_head_is_orthogonal(width):
    """Blocks of powers of two, the largest first; turned and turned back, a head is itself, and products stay."""
    blocks = {16: [16], 48: [32, 16], 64: [64], 80: [64, 16], 128: [128], 320: [256, 64]}[width]
    turn = torch.block_diag(*map(sylvester, blocks))
    a, b = torch.randn(2, 5, width, dtype=torch.float64)
    there, back = int8_pages.hadamard(a), int8_pages.hadamard(b, back=True)
    torch.testing.assert_close((there * back).sum(-1), (a * b).sum(-1))
    torch.testing.assert_close(int8_pages.hadamard(there, back=True), a)
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
    memory = 8 * PagedKVCache.bytes_per_page(model.config, 16, torch.int8)
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
def test_fp8_pages_serve_by_kernels(tiny_model, quantize):
    """Float8 pages serve by the kernels and in a gpus fixed buffers."""
    model, text = tiny_model(), [i * i % 89 for i in range(100)]
    formats = "float32", "bfloat16", "fp8"
    llms = [LLM(model, kv_dtype=name, quantize=quantize, max_batch=3) for name in formats]
    scores = [torch.tensor(llm.score(text)) for llm in llms]
    by_half, by_eight = ((score - scores[0]).norm() for score in scores[1:])
    assert 0 < by_eight < 2 * 2**5 * by_half, "five binary digits fewer"
    prompts, params = [text[:9], text[:30], text[5:7]], SamplingParams(8, temperature=0, ignore_eos=True)
    expected = [output.token_ids for output in llms[-1].generate(prompts, params)]
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
