"""Experts packed in files: the numbers that their formats define, computed from the codes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.engine import Transformer
from warploom.engine.cli import main
from warploom.engine.config import ModelConfig
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.formats.packed_weight import PackedExperts, PackedLinear
from warploom.engine.serving import LLM
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.serving.execution.serving_model import NativeExperts
from warploom.tokenizer import BPETokenizer

from .test_packed_checkpoints import GROUP, awq, gptq

NEEDS_NATIVE = pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")
TOKENS = torch.arange(1, 41).view(1, 40) * 7 % 96
SHAPE = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip


def assert_serves_its_codes(directory, rms=0.1):
    """Experts stay packed, and what is served is near the model of the dequantized weights."""
    packed, _ = load_model(directory, "cpu", packed=True)
    plain, _ = load_model(directory, "cpu", "float32")
    for block, whole in zip(packed.blocks, plain.blocks):
        for name in ("w_gate_up", "w_down"):
            assert isinstance(getattr(block.ffn, name), PackedExperts)
            assert torch.equal(getattr(block.ffn, name).dequantize(), getattr(whole.ffn, name).detach().float())
    with torch.no_grad():
        torch.testing.assert_close(packed.float()(TOKENS), plain(TOKENS), rtol=0, atol=1e-3)
    if not HAS_NATIVE:
        return
    llm, text = LLM(directory), TOKENS[0].tolist()
    assert "matrices of" in llm.packing
    assert all(isinstance(block.ffn.product, NativeExperts) for block in llm.model.blocks)
    wrong = torch.tensor(llm.score(text)) - torch.tensor(LLM(plain).score(text))
    assert wrong.square().mean().sqrt() < rms


def qwen3_moe(directory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True, **SHAPE
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_experts_of_gguf_open_as_theirs(kind, tmp_path):
    """A file written by the gguf package: transformers says what its numbers are."""
    gguf = pytest.importorskip("gguf")
    model = qwen3_moe(tmp_path / "float")
    tensors = load_file(tmp_path / "float" / "model.safetensors")
    for layer in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}.weight" for e in range(4)]
            tensors[f"model.layers.{layer}.mlp.experts.{part}.weight"] = torch.stack([tensors.pop(n) for n in names])
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "qwen3moe")
    writer.add_context_length(64), writer.add_embedding_length(64), writer.add_block_count(2)
    writer.add_feed_forward_length(128), writer.add_head_count(4), writer.add_head_count_kv(2)
    writer.add_key_length(32), writer.add_value_length(32), writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(float(model.config.rope_parameters["rope_theta"]))
    writer.add_expert_count(4), writer.add_expert_used_count(2), writer.add_expert_feed_forward_length(96)
    quantized, exact = getattr(gguf.GGMLQuantizationType, kind), {}
    for name, tensor in tensors.items():
        *where, leaf = name.removeprefix("model.layers.").split(".")
        layer = where.pop(0) if name.startswith("model.layers.") else None
        part = GGUF_NAMES[".".join(where)]
        stored = f"{'' if layer is None else f'blk.{layer}.'}{part}.{leaf}"
        numbers = tensor.float().numpy()
        if "exps" in part and kind != "F32":
            blocks = gguf.quants.quantize(numbers, quantized)
            writer.add_tensor(stored, blocks, raw_dtype=quantized)
            numbers = gguf.quants.dequantize(blocks, quantized)
        else:
            writer.add_tensor(stored, numbers)
        exact[name] = torch.from_numpy(np.ascontiguousarray(numbers))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    state = model.state_dict()
    for layer, block in enumerate(model.model.layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        block.mlp.experts.gate_up_proj.data = torch.cat(
            [exact[f"{prefix}.gate_proj.weight"], exact[f"{prefix}.up_proj.weight"]], 1
        )
        block.mlp.experts.down_proj.data = exact[f"{prefix}.down_proj.weight"]
    assert state.keys() == model.state_dict().keys()
    ours, _ = load_model(tmp_path / "model.gguf", "cpu", "float32")
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), model.eval()(TOKENS).logits, rtol=0, atol=2e-5)
    if kind != "F32":
        assert_serves_its_codes(tmp_path / "model.gguf")


@pytest.mark.parametrize("method", [awq, gptq])
def test_experts_of_words_stay_packed(method, tmp_path):
    """Of AWQ and GPTQ, an expert a set of tensors."""
    qwen3_moe(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors.pop(name).shape
        q_NC, z_NG = torch.randint(0, 16, (rows, columns)), torch.full((rows, columns // GROUP), 8)
        s_NG = (torch.rand(rows, columns // GROUP) + 0.5).half().float() / 128
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{part}": x.contiguous() for part, x in method(q_NC, z_NG, s_NG, 4).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    said = {"quant_method": method.__name__, "bits": 4, "group_size": GROUP}
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": said}))
    assert_serves_its_codes(tmp_path)


def mxfp4_model(directory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=6, intermediate_size=96,
        layer_types=["sliding_attention", "full_attention"], **SHAPE,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tensors, draw = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=draw)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "mxfp4"}}))
    return tensors


def test_experts_in_mxfp4_stay_packed(tmp_path):
    """What they are is held to transformers by test_published_layouts.py."""
    mxfp4_model(tmp_path)
    assert_serves_its_codes(tmp_path)


def test_mxfp4_scales_half_precision_cannot_hold_are_dequantized(tmp_path):
    tensors = mxfp4_model(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name][0, 0, :2] = torch.tensor([10, 120])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(tmp_path, "cpu", packed=True)
    assert isinstance(model.blocks[0].ffn.w_gate_up, PackedExperts) and isinstance(
        model.blocks[0].ffn.w_down, torch.Tensor
    )


@NEEDS_NATIVE
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantize_writes_experts(scheme, tmp_path, capsys):
    """Calibrated, they lose less than rounded; the directory opens packed."""
    text = "The loom weaves 1234 threads, and more of them; warp and weft cross at right angles.\n"
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=288, d_model=96, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=160, max_seq_len=64,
                         n_experts=4, experts_per_token=2)  # fmt: skip
    save_model(Transformer(config), tmp_path / "float", BPETokenizer.train([text], 280))
    (tmp_path / "text.txt").write_text(text * 20)
    flags = ["--bits", scheme[3:], "--calibrate", str(tmp_path / "text.txt")]
    assert main(["quantize", str(tmp_path / "float"), "--out", str(tmp_path / "packed"), *flags]) == 0
    assert "held out: KL" in capsys.readouterr().out
    packed, _ = load_model(tmp_path / "packed", "cpu", packed=True)
    ffn = packed.blocks[1].ffn
    assert isinstance(ffn.w_down, PackedExperts) and isinstance(ffn.router, PackedLinear)
    exact, calibrated, rounded = (
        torch.tensor(llm.score(text))
        for llm in (LLM(tmp_path / "float"), LLM(tmp_path / "packed"), LLM(tmp_path / "float", quantize=scheme))
    )
    assert 0 < (calibrated - exact).norm() < (1.1 if scheme == "int8" else 0.8) * (rounded - exact).norm()
