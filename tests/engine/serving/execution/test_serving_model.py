"""Claims about the C++ twins: paged attention, 8-bit products, whole blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom import kernels
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution.kv_cache import (
    HAS_NATIVE,
    KernelAttention,
    NativeAttend,
    PagedKVCache,
    _native,
    to_device,
)
from warploom.engine.serving.execution.sampler import _sample_native
from warploom.engine.serving.execution.serving_model import NativeLinear

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")


class Layer:
    """What `attend` asks of a layer."""

    def __init__(self, head_dim, window=None, softcap=None, sinks=None):
        self.index, self.window, self.softcap, self.scale = 1, window, softcap, head_dim**-0.5
        self.sinks = sinks


def ragged_step(store, dtype, H, K, D):
    """Chunks and decodes of four sequences, in pages out of order, and two tokens of padding."""
    counts, contexts = np.array([1, 7, 1, 20], dtype=np.int32), [33, 9, 1, 50]
    table = np.random.default_rng(0).permutation(store.keys.shape[1])[:32].reshape(4, 8).astype(np.int32)
    spans = [np.arange(c - n, c) for c, n in zip(contexts, counts)]
    positions = np.concatenate([*spans, [0, 0]])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, len(positions), heads, D).to(dtype) for heads in (H, K, K))
    layout = store.layout(table, np.arange(4), positions, counts)
    return store.attend(layout, to_device(layout.arrays(), store.keys.device)), q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "K", "D"), [(4, 2, 32), (3, 3, 24), (8, 1, 64), (2, 1, 80)])
@pytest.mark.parametrize("limits", [{}, {"window": 6, "softcap": 3.0}, {"window": 6, "sinks": torch.arange(8.0) - 2}])
def test_paged_attention_cpp_equals_reference(dtype, H, K, D, limits):
    """Paged attention in cpp equals the kernels reference."""

    class Shape:
        n_layers, kv_heads, head_size = 2, K, D

    limits = {name: value[:H] if name == "sinks" else value for name, value in limits.items()}
    stores = [PagedKVCache(Shape, 40, 8, dtype, torch.device("cpu")) for _ in range(2)]
    for store in stores:
        torch.manual_seed(1)
        store.keys.normal_()
        store.values.normal_()
    stores[1].layers = None
    outputs = []
    for store, kind in zip(stores, (NativeAttend, KernelAttention)):
        attend, q, k, v = ragged_step(store, dtype, H, K, D)
        assert type(attend) is kind
        outputs.append(attend(q, k, v, Layer(D, **limits))[:, :-2].float())
    assert torch.equal(stores[0].keys, stores[1].keys) and torch.equal(stores[0].values, stores[1].values)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)


def rounded_rows(weight):
    """8 bits with a scale a row: integers and scales."""
    scale = weight.abs().amax(-1) / 127
    return (weight / scale[:, None]).round(), scale


@pytest.mark.parametrize(("outputs", "columns"), [(64, 64), (50, 72), (200, 300), (16, 24)])
def test_int8_product_error_and_batch_invariance(outputs, columns):
    """An 8 bit product is as near as 8 bits allow and the same in any batch."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outputs, columns), torch.randn(outputs), torch.randn(23, columns)
    x[:, 3] *= 100  # one large activation
    linear = NativeLinear(weight, bias)
    together = linear(x)
    assert all(torch.equal(linear(x[i : i + n]), together[i : i + n]) for i, n in [(0, 1), (5, 2), (9, 5), (2, 13)])
    int_weight, scale = rounded_rows(weight)
    exact = x.double() @ (int_weight.double() * scale.double()[:, None]).T + bias.double()
    step = x.abs().amax(-1, keepdim=True).double() / 127  # no activation is off by more than half of it
    bound = (step / 2 * (int_weight.double() * scale.double()[:, None]).abs().sum(-1)) + 1e-3
    assert ((together.double() - exact).abs() <= bound).all()


@settings(max_examples=40)
@given(st.integers(1, 150), st.integers(1, 200), st.integers(1, 9), st.integers(-30, 30), st.integers(0, 2**31))
def test_int8_plain_loop_equals_the_cpus_products(outputs, columns, rows, exponent, seed):
    """In every bit, for weights of any size: scales in half precision are counted in a unit of their row."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, columns, generator=generator) for n in (outputs, rows))
    linear = NativeLinear(weight * 2.0**exponent, torch.randn(outputs, generator=generator))
    _native.use_packed_loops("plain")
    plain = linear(x)
    _native.use_packed_loops("best")
    assert torch.equal(linear(x), plain)
    assert torch.equal(NativeLinear(weight * 2.0**exponent, None)(x), NativeLinear(weight, None)(x) * 2.0**exponent)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2", "mixtral"])
def test_quantized_model_close_original_kept(tiny_model, shape):
    """A quantized model says nearly the same and leaves the original alone."""
    model = tiny_model(shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (prompt,) = [[i * 7 % 97 for i in range(60)]]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    exact, rounded = (
        torch.tensor([entry.logprob for entry in LLM(model, quantize=how).generate(prompt, params).prompt_logprobs])
        for how in (None, "int8")
    )
    assert (exact - rounded).abs().mean() < 0.02 * exact.abs().mean()
    assert not torch.equal(exact, rounded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
def test_int8_activations_double_error_at_most(tiny_model, shape):
    """Against weights that are rounded the same way and meet activations in full."""
    model, rounded = (tiny_model(shape, vocab_size=500, tie_embeddings=False) for _ in range(2))
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.dim() == 2 and (name.startswith("blocks") or name == "head.weight"):
                numbers, scale = rounded_rows(weight)
                weight.copy_(numbers * scale[:, None])
    text = [i * i % 487 for i in range(250)]
    exact, weights, both = (
        torch.tensor(llm.score(text)) for llm in (LLM(model), LLM(rounded), LLM(model, quantize="int8"))
    )
    assert 0 < (both - exact).norm() < 2 * (weights - exact).norm()


def test_quantized_tokens_batch_invariant(tiny_model):
    """A quantized model gives the same tokens in any company."""
    model = tiny_model(dtype=torch.bfloat16)
    prompts = [[(i * j + j) % 97 for j in range(1, 5 + 3 * i)] for i in range(12)]
    params = [SamplingParams(max_tokens=12, seed=i, ignore_eos=True) for i in range(12)]
    together = [output.token_ids for output in LLM(model, quantize="int8").generate(prompts, params)]
    memory = 8 * 16 * model.config.kv_bytes_per_token(2)
    small = LLM(model, quantize="int8", max_batch_tokens=5, max_batch=3, kv_memory=memory)
    assert [output.token_ids for output in small.generate(prompts, params)] == together


def test_the_number_of_workers_changes_no_token(tiny_model):
    llm = LLM(tiny_model(), quantize="int8")
    expected = llm.generate([1, 2, 3], SamplingParams(temperature=0)).token_ids
    for threads in (4, 1, 2):
        _native.set_threads(threads)
        assert llm.generate([1, 2, 3], SamplingParams(temperature=0)).token_ids == expected


def test_a_draw_in_cpp_is_the_kernels_draw():
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 400, 2500
    logits = torch.randn(rows, vocabulary, generator=generator) * 3

    def uniform(low, high):
        return torch.empty(rows).uniform_(low, high, generator=generator)

    temperature = uniform(0.1, 2.0) * (uniform(0, 1) > 0.1)
    top_k = torch.randint(0, 60, (rows,), generator=generator, dtype=torch.int32) * (uniform(0, 1) > 0.5)
    top_p, min_p = uniform(0.05, 1.5).clamp(max=1), uniform(-0.1, 0.1).clamp(min=0)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 2**40, (rows,), generator=generator)
    settings = temperature, top_k.int(), top_p, min_p, seeds, positions
    assert torch.equal(_sample_native(logits, torch.arange(rows), *settings), kernels.sample(logits, *settings))


def test_llm_outlives_its_models_memory(tiny_model):
    """`Module.to` replaces the memory of parameters, whose addresses C++ has."""
    model = tiny_model()
    llm = LLM(model)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    expected = llm.generate([1, 2, 3], params).token_ids
    shape = model.embedding.weight.shape
    model.to(torch.float64)
    junk = [torch.full(shape, 1e3) for _ in range(8)]
    assert llm.generate([1, 2, 3], params).token_ids == expected and junk


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 97}, "token 97"),
        ({"tokens": -1}, "token -1"),
        ({"positions": 10**9}, "position 1000000000"),
        ({"slots": 64}, "slot 64"),
        ({"sequences": 1}, "sequence 1"),
        ({"table": 4}, "page 4"),
        ({"table": -1}, "page -1"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_native_wrong_index_raises(tiny_model, changes, says, dtype):
    from warploom.engine.serving.execution.kv_cache import _native
    from warploom.engine.serving.execution.serving_model import serving_model

    model, _ = serving_model(tiny_model(), None)
    pages = PagedKVCache(model.config, 4, 16, dtype, torch.device("cpu")).layers
    arrays = {"positions": np.zeros(1, np.int64), "sequences": np.zeros(1, np.int32), "slots": np.zeros(1, np.int64)}
    arrays = {**arrays, "table": np.zeros((1, 4), np.int32), "tokens": np.zeros(1, np.int64)}

    def run():
        *step, tokens = arrays.values()
        hidden = torch.empty(1, model.config.d_model)
        model.native.run(tokens, _native.Step(*step), pages, model.rotations, model.growth, hidden)

    run()
    for name, value in changes.items():
        arrays[name][...] = value
    with pytest.raises(IndexError, match=says):
        run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("H", "K", "D"), [(9, 3, 64), (8, 8, 32), (5, 1, 80)])
@pytest.mark.parametrize("limits", [{}, {"window": 20, "softcap": 3.0}, {"sinks": torch.arange(9.0) - 3}])
def test_attention_bits_in_any_chunks(dtype, H, K, D, limits):
    """A token's bits are those of its own sequence: a whole prompt, any cut of it, and one token after another."""

    class Shape:
        n_layers, kv_heads, head_size = 2, K, D

    limits = {name: value[:H] if name == "sinks" else value for name, value in limits.items()}
    lengths, table = (111, 90), np.random.default_rng(0).permutation(14).reshape(2, 7).astype(np.int32)
    torch.manual_seed(0)
    sides = [[torch.randn(length, heads, D) * 1.5 for heads in (H, K, K)] for length in lengths]

    def attended(steps):
        store, gathered = PagedKVCache(Shape, 14, 16, dtype, torch.device("cpu")), ([], [])
        for spans in steps:
            rows = np.array([row for row, (a, b) in enumerate(spans) if b > a])
            parts = [(row, *spans[row]) for row in rows]
            positions = np.concatenate([np.arange(a, b) for _, a, b in parts])
            layout = store.layout(table, rows, positions, np.array([b - a for _, a, b in parts], dtype=np.int32))
            q, k, v = (torch.cat([sides[row][side][a:b] for row, a, b in parts])[None] for side in range(3))
            out = NativeAttend(store.layers, layout)(q, k, v, Layer(D, **limits))[0]
            for (row, *_), piece in zip(parts, out.split([b - a for _, a, b in parts])):
                gathered[row].append(piece)
        return [torch.cat(pieces) for pieces in gathered]

    whole = attended([[(0, 111), (0, 90)]])
    cuts = [[(0, 37), (0, 5)], [(37, 38), (5, 64)], [(38, 111), (64, 90)]]
    alone = [[(i, i + 1), (min(i, 90), min(i + 1, 90))] for i in range(111)]
    for steps in (cuts, alone):
        assert all(torch.equal(*pair) for pair in zip(attended(steps), whole))
