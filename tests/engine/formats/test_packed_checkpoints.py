"""Packed checkpoints of AWQ, GPTQ, compressed-tensors, MLX and bitsandbytes: the numbers their formats define."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.engine import Transformer
from warploom.engine.config import ModelConfig
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.formats.packed_weight import PackedLinear
from warploom.engine.serving import LLM
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE

GROUP = 32
PARTS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def words(numbers, bits, order=range(8)):
    """32-bit words of rows of small numbers, bit by bit; `order[i]` is the place in a word of what comes i-th."""
    each = 32 // bits
    rows = []
    for row in numbers.tolist():
        found = []
        for start in range(0, len(row), each):
            word = 0
            for place in range(each):
                word |= row[start + (order[place] if each == 8 else place)] << bits * place
            found.append(word - (1 << 32) if word >> 31 else word)
        rows.append(found)
    return torch.tensor(rows, dtype=torch.int32)


def awq(q_NC, z_NG, s_NG, bits):
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(q_NC.T, bits, order), "qzeros": words(z_NG.T, bits, order), "scales": s_NG.T.half()}


def gptq(q_NC, z_NG, s_NG, bits):
    index = torch.arange(q_NC.shape[1], dtype=torch.int32) // GROUP
    return {"qweight": words(q_NC, bits).T, "qzeros": words(z_NG.T - 1, bits), "scales": s_NG.T.half(), "g_idx": index}


def compressed(q_NC, z_NG, s_NG, bits):
    shape = torch.tensor(q_NC.shape)
    zeros = words(z_NG.T, bits).T
    return {
        "weight_packed": words(q_NC, bits),
        "weight_zero_point": zeros,
        "weight_scale": s_NG.half(),
        "weight_shape": shape,
    }


def mlx(q_NC, z_NG, s_NG, bits):
    return {"weight": words(q_NC, bits).view(torch.uint32), "scales": s_NG, "biases": -z_NG * s_NG}


def int8_rows(q_NC, z_NG, s_NG, bits):
    return {"weight": (q_NC - 128).to(torch.int8), "weight_scale": s_NG[:, :1].half()}


CASES = {
    "awq": (awq, 4, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "gptq": (gptq, 4, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq 8": (gptq, 8, {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "w4a16": (
        compressed,
        4,
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}},
    ),
    "mlx": (mlx, 4, {"bits": 4, "group_size": GROUP}),
    "mlx 8": (mlx, 8, {"bits": 8, "group_size": GROUP, "mode": "affine"}),
    "w8a8": (int8_rows, 8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
}


def written(directory, case, even=False):
    """A model whose matrices are random integers; what they are in float32, by published name."""
    pack, bits, said = CASES[case]
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, max_seq_len=64)
    save_model(Transformer(config).half(), directory)
    tensors, exact = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.split(".")[-2] in PARTS]:
        rows, columns = tensors.pop(name).shape
        q_NC = torch.randint(0, 1 << bits, (rows, columns))
        z_NG = torch.randint(1, 1 << bits, (rows, columns // GROUP))
        z_NG = torch.full_like(z_NG, 1 << bits - 1) if even or pack is int8_rows else z_NG
        s_NG = (torch.rand(rows, columns // GROUP) + 0.5).half().float() / 2 ** (bits + 3)
        s_NG = s_NG[:, :1].expand_as(s_NG) if pack is int8_rows else s_NG
        z_NC, s_NC = (x.repeat_interleave(GROUP, 1) for x in (z_NG, s_NG))
        exact[name] = (q_NC - z_NC) * s_NC
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{part}": x.contiguous() for part, x in pack(q_NC, z_NG, s_NG, bits).items()}
    save_file(tensors, directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"quantization_config": said}))
    return exact


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_integers_of_a_checkpoint_are_their_definition(case, even, tmp_path):
    """In every bit without zero points; with them within the rounding of half precision."""
    exact = written(tmp_path, case, even)
    plain, _ = load_model(tmp_path, "cpu", "float32")
    packed, _ = load_model(tmp_path, "cpu", packed=True)
    for model in (plain, packed):
        for index, block in enumerate(model.blocks):
            q, k, v = (exact[f"model.layers.{index}.self_attn.{part}.weight"] for part in PARTS[:3])
            down = exact[f"model.layers.{index}.mlp.down_proj.weight"]
            for found, wanted in ((block.attention.qkv, torch.cat([q, k, v])), (block.ffn.down, down)):
                assert isinstance(found, PackedLinear) == (model is packed)
                reach = 0 if (even and "mlx" not in case) or case == "w8a8" else 2**-11 * 2 * wanted.abs().max().item()
                torch.testing.assert_close(found.weight.detach(), wanted, rtol=0, atol=reach)


@pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("case", CASES)
def test_integers_of_a_checkpoint_serve_packed(case, tmp_path):
    written(tmp_path, case)
    llm, tokens = LLM(tmp_path), [7 * i % 96 for i in range(50)]
    assert "matrices of" in llm.packing
    exact = torch.tensor(LLM(tmp_path, dtype="float32", quantize=None, device="cpu", kv_dtype="float32").score(tokens))
    found = torch.tensor(llm.score(tokens))
    plain = torch.tensor(LLM(load_model(tmp_path, "cpu", "float32")[0]).score(tokens))
    assert (found - plain).square().mean().sqrt() < 0.1 and (exact - plain).square().mean().sqrt() < 0.1


def test_columns_in_order_of_activation_are_dequantized(tmp_path):
    exact = written(tmp_path, "gptq", even=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name, order = "model.layers.0.mlp.down_proj", torch.randperm(128)
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order]
    save_file(tensors, tmp_path / "model.safetensors")
    packed, _ = load_model(tmp_path, "cpu", packed=True)
    assert not isinstance(packed.blocks[0].ffn.down, PackedLinear)
    scale_NG = tensors[f"{name}.scales"].float().T
    codes_NC = exact[f"{name}.weight"] / scale_NG.repeat_interleave(GROUP, 1)
    wanted = codes_NC * scale_NG[:, order // GROUP]
    torch.testing.assert_close(packed.blocks[0].ffn.down.weight.float(), wanted.half().float(), atol=1e-4, rtol=2**-10)


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("awq", {"bits": 3}, "bits is 3; 4 are read"),
        ("awq", {"version": "marlin"}, "version 'marlin' of AWQ is not read"),
        ("gptq", {"bits": "4"}, "bits is '4'; 4 and 8 are read"),
        ("gptq", {"quant_method": "hqq"}, "packed by 'hqq' are not supported"),
        ("w4a16", {"config_groups": {}}, "num_bits is None"),
        ("mlx", {"mode": "mxfp4"}, "mode 'mxfp4' of MLX is not read"),
        ("mlx", {"bits": 3}, "bits is 3; 4 and 8 are read"),
    ],
)
def test_settings_that_are_not_read_are_refused(case, change, says, tmp_path):
    written(tmp_path, case)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path, "cpu")


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_tensors_that_do_not_fit_are_refused(part, tmp_path):
    written(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    for changed in (tensors[name][:-1].contiguous(), None):
        more = {} if changed is None else {name: changed}
        save_file({key: x for key, x in tensors.items() if key != name} | more, tmp_path / "model.safetensors")
        if part == "g_idx" and changed is None:
            continue  # there need be none
        with pytest.raises(ValueError, match=r"up_proj|does not account for"):
            load_model(tmp_path, "cpu", packed=True)


def repacked(directory, said, pack):
    """A model directory whose matrices are packed by another's package; what that package reads back."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, max_seq_len=64)
    save_model(Transformer(config).bfloat16(), directory)
    tensors, exact = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.split(".")[-2] in PARTS]:
        parts, exact[name] = pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('.weight')}.{part}": x.contiguous() for part, x in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | said))
    return exact


def assert_same(directory, exact, reach=0.0):
    model, _ = load_model(directory, "cpu", "float32")
    for index, block in enumerate(model.blocks):
        q, k, v = (exact[f"model.layers.{index}.self_attn.{part}.weight"] for part in PARTS[:3])
        for found, wanted in (
            (block.attention.qkv, torch.cat([q, k, v])),
            (block.ffn.down, exact[f"model.layers.{index}.mlp.down_proj.weight"]),
        ):
            atol = reach * wanted.abs().max().item()
            torch.testing.assert_close(found.weight.detach(), wanted.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4"])
def test_bitsandbytes_4_bits_are_its_own(kind, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

    def pack(weight):
        codes, state = functional.quantize_4bit(weight, quant_type=kind[:3], compress_statistics="nested" in kind)
        parts = {f"weight.{part}": x for part, x in state.as_dict(packed=True).items()}
        return {"weight": codes, **parts}, functional.dequantize_4bit(codes, state)

    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind[:3]}
    assert_same(tmp_path, repacked(tmp_path, {"quantization_config": method}, pack))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not make"):
        load_model(tmp_path, "cpu")


def test_bitsandbytes_8_bits_are_packed(tmp_path):
    def pack(weight):
        scale = weight.float().abs().amax(1)
        codes = (weight.float() / scale[:, None] * 127).round().to(torch.int8)
        return {"weight": codes, "SCB": scale}, codes * (scale[:, None] / 127)

    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    assert_same(tmp_path, repacked(tmp_path, said, pack), 2**-11)
    packed, _ = load_model(tmp_path, "cpu", packed=True)
    assert isinstance(packed.blocks[0].ffn.down, PackedLinear)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_mlx_weights_are_its_own(bits, group, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

    def pack(weight):
        parts = mx.quantize(mx.array(weight.float().numpy()), group_size=group, bits=bits)
        exact = torch.from_numpy(numpy.array(mx.dequantize(*parts, group_size=group, bits=bits)))
        return dict(zip(("weight", "scales", "biases"), (torch.from_numpy(numpy.array(part)) for part in parts))), exact

    about = {"bits": bits, "group_size": group}
    exact = repacked(tmp_path, {"quantization": about, "quantization_config": about}, pack)
    assert_same(tmp_path, exact, 2**-10)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_words_are_its_own(bits):
    """What their package packs is what ours is tested with."""
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    q_NC = torch.randint(0, 1 << bits, (16, 64))
    signed = (q_NC - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(helpers.pack_to_int32(signed, bits), words(q_NC, bits))
    assert torch.equal(helpers.pack_to_int32(signed, bits, packed_dim=0), words(q_NC.T, bits).T)
