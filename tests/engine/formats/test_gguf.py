"""GGUF files: read back by `gguf`, llama.cpp's own package, and by `transformers` through it."""

import numpy as np
import pytest
import torch

from warploom.engine.cli import main
from warploom.engine.config import ModelConfig
from warploom.engine.formats.gguf import save_gguf
from warploom.engine.formats.gguf_vocabulary import PRETOKENIZERS
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_info import read_tokenizer
from warploom.engine.formats.model_writer import save_model
from warploom.engine.formats.packed_weight import PackedExperts
from warploom.engine.model import Transformer
from warploom.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

from ...llama_cpp import LlamaCpp

gguf = pytest.importorskip("gguf", reason="needs gguf, which reads what is written here")
SENTENCE = "The loom weaves 1234 threads — isn't it fine?\n\n  织布机 naïve  \tend"
SHAPE = dict(vocab_size=288, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
CONFIGS = {
    "llama": {},
    "gpt2": dict(
        norm="layernorm",
        norm_eps=1e-5,
        position="learned",
        ffn="gelu",
        bias=True,
        n_kv_heads=None,
        d_ff=256,
        max_seq_len=1024,  # transformers overlooks any other d_ff and max_seq_len here,
    ),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, head_dim=128, tie_embeddings=False),  # and any other head_dim here
}
TOKENS = torch.arange(80).view(2, 40) * 7 % 288


def build(**changes) -> Transformer:
    """Every parameter random, norms and biases too: nothing that is 1 or 0 can hide a mistake."""
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + 0.02)
    return model.eval()


def read(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_reads_gguf_same_logits(name, tmp_path):
    """Transformers reads the file and computes the same."""
    transformers = pytest.importorskip("transformers")
    ours = build(**CONFIGS[name])
    tokenizer = BPETokenizer.train([SENTENCE], 280, special_tokens=("<|endoftext|>",))
    save_gguf(ours, tmp_path / "model.gguf", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_llama_cpp_splits_text_alike(tmp_path):
    for pattern in PRETOKENIZERS:
        tokenizer = BPETokenizer.train([SENTENCE], 280, pattern=pattern, special_tokens=("<|endoftext|>",))
        save_gguf(build(), tmp_path / "m.gguf", tokenizer)
        assert LlamaCpp(tmp_path / "m.gguf").tokenize(SENTENCE) == tokenizer.encode(SENTENCE)


@pytest.mark.parametrize("name", [*CONFIGS, "llama3", "yarn", "mixtral", "qwen3moe"])
@torch.no_grad()
def test_llama_cpp_reads_file_same_logits(name, tmp_path):
    scaled = {
        "llama3": dict(rope_scaling=LLAMA3),
        "yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
        "mixtral": dict(n_experts=4),
        "qwen3moe": dict(n_experts=4, qk_norm=True, head_dim=128, tie_embeddings=False),
    }
    tokenizer = BPETokenizer.train([SENTENCE], 280, special_tokens=("<|endoftext|>",))
    ours = build(**{**CONFIGS, **scaled}[name])
    save_gguf(ours, tmp_path / "m.gguf", tokenizer)
    theirs = LlamaCpp(tmp_path / "m.gguf")
    for length in (1, 20, 50):
        ids = tokenizer.encode(SENTENCE)[:length]
        expected = ours(torch.tensor([ids]))[0, -1].log_softmax(-1)
        found = theirs.log_probs(ids, len(expected))
        told = ~found.isnan()
        assert told.sum() > 270
        torch.testing.assert_close(found[told], expected[told], atol=1e-3, rtol=1e-4)


def test_sentencepiece_vocabulary_is_llama_cpps(tmp_path):
    """Written, read by llama.cpp, and read back: the same ids, begin token and end token."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [line for text in (SENTENCE, __doc__, *CONFIGS) for line in text.split("\n")]
    for prefix in (True, False):
        with open(tmp_path / "tokenizer.model", "wb") as file:
            trainer.train(
                sentence_iterator=iter(lines), model_writer=file, model_type="bpe", vocab_size=330, byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix,
                minloglevel=2,
            )  # fmt: skip
        tokenizer = load_tokenizer(tmp_path)
        save_gguf(build(vocab_size=336), tmp_path / "m.gguf", tokenizer)
        theirs, again = LlamaCpp(tmp_path / "m.gguf"), read_tokenizer(tmp_path / "m.gguf")
        for text in (SENTENCE, "  two  spaces", "a\n\n  b 你好 é"):
            assert theirs.tokenize(text) == tokenizer.encode(text) == again.encode(text)
            assert again.decode(again.encode(text)) == text
        assert again.prefix_ids == tokenizer.prefix_ids == [1] and again.eos_id == tokenizer.eos_id == 2


def test_gguf_metadata_is_what_llama_cpp_reads(tmp_path):
    """Metadata and vocabulary are what llama cpp looks for."""
    tokenizer = BPETokenizer.train([SENTENCE], 280, special_tokens=("<|endoftext|>",))
    save_gguf(build(), tmp_path / "m.gguf", tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.pre"] == "dbrx" and len(fields["tokenizer.ggml.tokens"]) == 288
    assert fields["tokenizer.ggml.tokens"][tokenizer.eos_id] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][tokenizer.eos_id] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert len(fields["tokenizer.ggml.merges"]) == len(tokenizer.merges)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_gguf_narrow_formats_round_closest(dtype, tmp_path):
    """Against the numbers that gguf's own decoder finds in the file."""
    model = build()
    save_gguf(model, tmp_path / "m.gguf", dtype=dtype)
    tensor = read(tmp_path / "m.gguf")["blk.1.ffn_down.weight"]
    found = gguf.dequantize(tensor.data, tensor.tensor_type)
    wanted = model.blocks[1].ffn.down.weight.detach().numpy()
    if dtype == "q8_0":
        assert np.array_equal(tensor.data, gguf.quantize(wanted, gguf.GGMLQuantizationType.Q8_0))
    step = {"float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 127}[dtype]
    assert np.abs(found - wanted).max() <= step * np.abs(wanted).max()


def test_experts_and_slowed_rotations_are_stored_whole(tmp_path):
    model = build(n_experts=4, rope_scaling=LLAMA3)
    save_gguf(model, tmp_path / "m.gguf")
    tensors = read(tmp_path / "m.gguf")
    gate, up = model.blocks[0].ffn.w_gate_up.detach().chunk(2, dim=1)
    assert np.array_equal(tensors["blk.0.ffn_gate_exps.weight"].data, gate)
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"].data, up)
    slow = tensors["rope_freqs.weight"].data
    assert slow[0] == pytest.approx(1, rel=1e-4) and slow[-1] == pytest.approx(8, rel=1e-4)


@torch.no_grad()
def test_experts_by_themselves_open_as_stacked_ones(tmp_path):
    """Mixtral's files of early 2024 have a tensor an expert: `blk.0.ffn_gate.3`."""
    model = build(n_experts=4)
    save_gguf(model, tmp_path / "m.gguf", dtype="q8_0")
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for name, field in file.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in file.tensors:
        experts = enumerate(tensor.data) if "_exps." in tensor.name else ((None, tensor.data),)
        for number, data in experts:
            writer.add_tensor(tensor.name.replace("_exps.", f".{number}."), data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    for packed in (False, True):
        old, new = (load_model(tmp_path / name, "cpu", packed=packed)[0] for name in ("old.gguf", "m.gguf"))
        assert torch.equal(old(TOKENS), new(TOKENS))
        assert isinstance(old.blocks[0].ffn.w_down, PackedExperts) == packed


def test_what_gguf_cannot_say_is_refused(tmp_path, capsys):
    def refusal(tokenizer=None, **changes):
        save_model(build(**changes), tmp_path / "m", tokenizer)
        assert main(["export", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--to", "gguf"]) == 2
        assert not (tmp_path / "m.gguf").exists()
        return capsys.readouterr().err

    assert "sliding_window=7 is shorter" in refusal(sliding_window=7)
    assert "no architecture of GGUF" in refusal(norm="none")
    assert "normalize_experts=False has no GGUF form" in refusal(n_experts=4, qk_norm=True, normalize_experts=False)
    assert "'dynamic' has no GGUF form" in refusal(rope_scaling=dict(LLAMA3, rope_type="dynamic"))
    assert "CharTokenizer has no GGUF form" in refusal(CharTokenizer.train(["abc"]))
    assert "pretokenizer" in refusal(BPETokenizer.train([SENTENCE], 270, pattern=r"\w+|\W+"))
