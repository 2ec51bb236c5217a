"""GGUF weights that stay packed, and quantized files written: as ggml has the numbers."""

import numpy as np
import pytest
import torch

from warploom.engine import Transformer
from warploom.engine.config import ModelConfig
from warploom.engine.formats.gguf import STORED, save_gguf
from warploom.engine.formats.gguf_blocks import TYPES
from warploom.engine.formats.gguf_packed import COMPUTED_SCALES, PACKED, pack_blocks
from warploom.engine.formats.gguf_quantize import QUANTIZERS
from warploom.engine.formats.gguf_reader import GGUFFile
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.packed_weight import PackedLinear, PackedWeight
from warploom.engine.serving import LLM
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.tokenizer import BPETokenizer

SCALES = {
    2: (0, 2),
    3: (0, 4),
    6: (0, 2),
    7: (0, 4),
    8: (0, 2),
    12: (0, 4),
    13: (0, 4),
    14: (208, 210),
    20: (0, 2),
    23: (0, 2),
}
LOSS = {"q8_0": 0.006, "q4_0": 0.12, "q5_0": 0.06, "q4_k": 0.08, "q6_k": 0.022}  # of normal numbers, a share


@pytest.mark.parametrize("number", PACKED)
def test_packed_blocks_are_ggmls_numbers(number):
    """In every bit where a file has half-precision scales, else within their rounding."""
    generator = np.random.default_rng(number)
    _, count, size, values = TYPES[number]
    blocks = generator.integers(0, 256, (60, size), np.uint8)
    if number != 39:
        at, end = SCALES[number]
        drawn = generator.standard_normal((60, (end - at) // 2)).astype(np.float16) * np.float16(1e-3)
        blocks[:, at:end] = drawn.view(np.uint8)
    else:
        blocks[:, 0] = generator.integers(110, 135, 60)
    segment = pack_blocks(number, blocks, 12)
    found = segment.dequantize(5 * count)
    exact = torch.from_numpy(values(blocks).reshape(12, 5 * count))
    if number not in COMPUTED_SCALES or number == 39:
        assert torch.equal(found, exact)
        return
    each = segment.scales.float().abs() * segment.units[:, None] * 64
    each = each if segment.minima is None else each + segment.minima.float().abs() * segment.units[:, None]
    reach = each.repeat_interleave(segment.layout.group, 1) * (2 if number == 23 else 1)
    assert ((found - exact).abs() <= 2**-11 * reach).all()


def test_scales_out_of_reach_are_dequantized():
    """Powers of two that half precision has not, whatever the row is counted in."""
    blocks = np.zeros((4, 17), np.uint8)
    blocks[:, 0] = 1, 254, 60, 200
    assert pack_blocks(39, blocks, 1) is None
    assert pack_blocks(39, blocks, 4) is not None


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_blocks_lose_what_their_bits_must(name):
    _, count, size, values = TYPES[STORED[name]]
    x = np.random.default_rng(0).standard_normal((50, count)).astype(np.float32)
    x[7] = 0
    with np.errstate(all="ignore"):
        blocks = QUANTIZERS[name](x)
    assert blocks.shape == (50, size)
    again = values(blocks)
    assert np.linalg.norm(again - x) < LOSS[name] * np.linalg.norm(x) and not again[7].any()


@pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("form", ["q8_0", "q4_0", "q4_k_m"])
def test_file_serves_packed_as_it_is_written(form, tmp_path):
    """Types mixed in one matrix: the weights in every bit, and log-probabilities within what 8-bit activations cost."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=288, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=512, max_seq_len=128)
    save_gguf(Transformer(config), tmp_path / "model.gguf", None, form)
    (packed, _), (plain, _) = (load_model(tmp_path / "model.gguf", "cpu", packed=kept) for kept in (True, False))
    layers = {path: layer for path, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 4 * config.n_layers + 1
    for path, layer in layers.items():
        exact = plain.head_weight if path == "head" else plain.get_submodule(path).weight
        reach = 3 * exact.abs().max().item()  # of scale times code, and of the minimum
        torch.testing.assert_close(layer.weight, exact, rtol=0, atol=2**-11 * reach if form == "q4_k_m" else 0)
    kinds = {TYPES[entry.type][0] for entry in GGUFFile(tmp_path / "model.gguf").tensors.values()}
    if form == "q4_k_m":
        assert kinds == {"F32", "Q4_K", "Q6_K"}
        assert {len(layer.packed.segments) for layer in layers.values()} == {1, 2}
    tokens = [7 * i % 288 for i in range(100)]
    exact = torch.tensor(LLM(plain, dtype="float32").score(tokens))
    found = torch.tensor(LLM(tmp_path / "model.gguf").score(tokens))
    assert (found - exact).square().mean().sqrt() < 0.03


def test_joined_segments_share_their_smallest_groups():
    segments = [pack_blocks(number, np.zeros((2, TYPES[number][2]), np.uint8), 2) for number in (12, 14, 12)]
    weight = PackedWeight.joined(segments, 256)
    assert [segment.layout.group for segment in weight.segments] == [16, 16, 16]
    assert weight.shape == (6, 256) and not weight.dequantize()[:2].any()


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("form", ["q8_0", "q4_0", "q4_k_m"])
def test_llama_cpp_reads_what_is_exported(form, experts, tmp_path):
    """Log-probabilities of the whole vocabulary after several prompts, within what its 8-bit activations cost.

    A random router has near ties, which those activations turn: of experts the usual prompt is judged.
    """
    xllamacpp = pytest.importorskip("xllamacpp")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=288, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=512, max_seq_len=128,
                         n_experts=experts)  # fmt: skip
    tokenizer = BPETokenizer.train(["warp and weft"], 280, special_tokens=("<|endoftext|>",))
    save_gguf(Transformer(config), tmp_path / "model.gguf", tokenizer, form)
    model, _ = load_model(tmp_path / "model.gguf", "cpu")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.verbosity = (
        str(tmp_path / "model.gguf"),
        256,
        False,
        -1,
    )
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    changes = []
    for start in range(6):
        tokens = [(7 * i + start) % 280 for i in range(20 + start)]
        asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 280, "n_probs": 280}
        found = server.handle_completions(asked)["choices"][0]["logprobs"]
        if found is None:  # the likeliest token ends the text
            continue
        theirs = {entry["id"]: entry["logprob"] for entry in found["content"][0]["top_logprobs"]}
        with torch.no_grad():
            ours = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        change = torch.tensor([ours[token].item() - logprob for token, logprob in theirs.items()])
        assert len(theirs) >= 270
        changes.append(change.square().mean().sqrt().item())
    judged = sorted(changes)[len(changes) // 2 if experts else -1]
    assert len(changes) >= 3 and judged < 0.05  # what 4-bit weights cost: 0.25 and more
