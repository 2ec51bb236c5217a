"""Claims about rounding to 8 bits where a model has channels far larger than the rest."""

import copy

import pytest
import torch

from warploom.engine.serving import LLM
from warploom.engine.serving.execution import serving_model as quantize
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.serving.execution.outlier_smoothing import smoothed

needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="needs the C++ extension")
LARGE = 64.0
TEXT = [i * i % 487 for i in range(250)]


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"shared_ff": 64, "n_experts": 2}], ids=str)
def test_a_balanced_layer_gives_the_very_same_bits(tiny_model, shape, changes):
    model = tiny_model(shape, **changes)
    for vector in (p for p in model.parameters() if p.dim() == 1):
        vector.data += torch.randn_like(vector) * (3 * torch.randn_like(vector)).exp()  # gains and biases of all sizes
    even = copy.deepcopy(model)
    even.blocks = torch.nn.ModuleList(smoothed(block, model.config) for block in model.blocks)
    assert not torch.equal(even.blocks[0].attention.qkv.weight, model.blocks[0].attention.qkv.weight)
    tokens = torch.arange(90)[None]
    assert torch.equal(even(tokens), model(tokens))


def test_what_outliers_take_from_eight_bits_is_given_back(tiny_model, monkeypatch):
    """The same function with and without channels 64 times larger where an activation, value or key is rounded."""
    model = tiny_model("llama", d_model=128, vocab_size=500, tie_embeddings=False)
    grown = with_outliers(model)
    expected, same = torch.tensor(LLM(model).score(TEXT)), torch.tensor(LLM(grown).score(TEXT))
    assert torch.equal(same, expected)
    usual, error = ((torch.tensor(LLM(m, quantize="int8").score(TEXT)) - expected).norm() for m in (model, grown))
    if HAS_NATIVE:
        assert error < 1.25 * usual
        monkeypatch.setattr(quantize, "smoothed", lambda block, config: block)
        assert (torch.tensor(LLM(grown, quantize="int8").score(TEXT)) - expected).norm() > 4 * usual


@needs_native
def test_tall_keys_keep_16_bit_pages(tiny_model):
    """Keys with large biases keep sixteen bits unless told otherwise."""
    model = tiny_model("llama", qkv_bias=True, vocab_size=500, tie_embeddings=False)
    pages = {}
    for bias in (1.0, 60.0):
        for block in model.blocks:
            block.attention.qkv.bias.data[4 * 16 + 7 :: 16][:2] = bias  # one channel of each key head
        pages[bias] = LLM(model, quantize="int8").engine.runner.store.dtype
    assert pages == {1.0: torch.int8, 60.0: torch.float32}
    assert LLM(model, quantize="int8", kv_dtype="int8").engine.runner.store.dtype == torch.int8


@torch.no_grad()
def with_outliers(model):
    """The same function: one side of a product 64 times larger, the other as much smaller."""
    model = copy.deepcopy(model)
    c, D = model.config, model.config.head_size
    H, K, F = c.n_heads, c.kv_heads, c.ff_size
    for block in model.blocks:
        attention, ffn = block.attention, block.ffn
        for norm, reader in ((block.attention_norm, attention.qkv), (block.ffn_norm, ffn.gate_up)):
            norm.weight[[5, 70]] *= LARGE
            reader.weight[:, [5, 70]] /= LARGE
        ffn.gate_up.weight[F + 3 :: 60] *= LARGE
        ffn.down.weight[:, 3::60] /= LARGE
        heads = attention.qkv.weight.unflatten(0, (-1, D))
        pair = [2, 2 + D // 2]
        heads[:H, pair] /= LARGE
        heads[H : H + K, pair] *= LARGE
        heads[H + K :, 9] *= LARGE
        attention.output.weight.unflatten(1, (H, D))[:, :, 9] /= LARGE
    return model
