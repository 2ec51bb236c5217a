"""Published layouts besides plain tensors: FP8 and MXFP4 weights, multimodal models, predictors of a second token.

Tiny random models; `transformers` opens the same files and says what they mean.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.packed_weight import describe, is_packed, packed_in
from warploom.engine.formats.weights import Weights, fp8

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TOKENS = torch.arange(1, 59).view(2, 29) * 7 % 97
SHAPE = dict(
    vocab_size=97, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROUTED = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, n_group=2, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    num_key_value_heads=4, head_dim=8,
)  # fmt: skip


def write(directory, kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return model


def change(directory, tensors, **values):
    """Write other tensors and fields over those of a model directory."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def assert_opens_as_theirs(directory, auto=transformers.AutoModelForCausalLM, dtype=torch.float32, **options):
    theirs = auto.from_pretrained(directory, dtype=dtype, **options).float().eval()
    ours = load_model(directory, device="cpu")[0].float().eval()
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def to_fp8(tensor, block):
    """Numbers in 8 bits and their scales, one a block."""
    rows, columns = (-(-size // side) for size, side in zip(tensor.shape, block))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor.float()
    blocks = padded.view(rows, block[0], columns, block[1])
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
    packed = (blocks / scale[:, None, :, None]).view_as(padded)[: tensor.shape[0], : tensor.shape[1]]
    return packed.contiguous().to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("kind, changes", [("qwen3", {}), ("deepseek_v3", ROUTED)])
def test_fp8_blocks_open_as_theirs(kind, changes, tmp_path):
    write(tmp_path, kind, **changes)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name], (128, 128))
    said = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[128, 128])
    change(tmp_path, tensors, quantization_config=said)
    dequantized = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    assert_opens_as_theirs(tmp_path, dtype=torch.bfloat16, quantization_config=dequantized)


@pytest.mark.parametrize("kind, changes", [("qwen3", {}), ("deepseek_v3", ROUTED)])
def test_fp8_for_a_gpu_is_packed(kind, changes, tmp_path, monkeypatch):
    """As `packed=True` reads it there, experts too; its codes mean what a CPU makes of them, but for two roundings."""
    write(tmp_path, kind, **changes)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name], (128, 128))
    change(tmp_path, tensors, quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]))
    plain = load_model(tmp_path, "cpu", "float32", packed=True)[0]
    monkeypatch.setattr(Weights, "keeps_fp8", property(lambda self: True, lambda self, value: None))
    model = load_model(tmp_path, "cpu", "float32", packed=True)[0]
    assert not is_packed(plain) and "float8 in groups of" in describe(model)
    for name, packed in packed_in(model):
        exact = plain.get_parameter(name)
        torch.testing.assert_close(packed.dequantize(), exact.float(), rtol=2**-8 + 2**-10, atol=0)
    with torch.no_grad():
        wanted = plain(TOKENS)
        torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_fp8_blocks_at_the_edge_are_narrower():
    """Of their size whatever the shape: DeepSeek has matrices of 576 rows, whose last blocks have 64."""
    numbers = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    for block in ((128, 128), (64, 256), (1, 32)):
        torch.testing.assert_close(fp8(*to_fp8(numbers, block), "w", block).float(), numbers, rtol=0.07, atol=1e-3)


def test_fp8_of_a_whole_tensor_is_read(tmp_path):
    """One scale a matrix, and scales of activations, which are ignored."""
    write(tmp_path, "mistral")
    tensors = load_file(tmp_path / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        packed, scale = to_fp8(tensors[name], tensors[name].shape)
        tensors |= {
            name: packed,
            f"{name}_scale": scale.view(()),
            f"{name.removesuffix('.weight')}.input_scale": scale.clone(),
        }
        plain[name] = (packed.float() * scale).bfloat16()
    change(tmp_path, tensors, quantization_config=dict(quant_method="fp8", activation_scheme="static"))
    ours = load_model(tmp_path, device="cpu")[0](TOKENS)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    change(tmp_path, plain)
    assert torch.equal(ours, load_model(tmp_path, device="cpu")[0](TOKENS))


def test_mxfp4_experts_open_as_theirs(tmp_path):
    write(
        tmp_path, "gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    tensors = load_file(tmp_path / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=draw)
    change(tmp_path, tensors, quantization_config=dict(quant_method="mxfp4"))
    assert_opens_as_theirs(tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True))


VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
WRAPPED = {  # a multimodal model: the model_type of its language part, and what its towers need
    "gemma3": ("gemma3_text", dict(vision_config=VISION | dict(patch_size=14), mm_tokens_per_image=4)),
    "mistral3": ("mistral", dict(vision_config=VISION | dict(model_type="pixtral", patch_size=14, head_dim=16))),
    "llava": ("llama", dict(vision_config=VISION | dict(model_type="clip_vision_model", patch_size=14))),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        dict(vision_config=dict(depth=1, hidden_size=32, num_heads=2, out_hidden_size=256, intermediate_size=48)),
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        dict(
            vision_config=dict(
                depth=1,
                hidden_size=32,
                num_heads=2,
                out_hidden_size=256,
                intermediate_size=48,
                deepstack_visual_indexes=[0],
            )
        ),
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_language_part_of_multimodal_opens(kind, tmp_path):
    text, changes = WRAPPED[kind]
    torch.manual_seed(0)
    sections = (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
        if "_vl" in kind
        else {}
    )
    said = {**SHAPE, "model_type": text, "head_dim": 64, **sections}
    config = transformers.AutoConfig.for_model(kind, text_config=said, **changes)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_opens_as_theirs(tmp_path, transformers.AutoModelForImageTextToText)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_predictor_of_second_token_is_ignored(kind, tmp_path):
    write(tmp_path, kind, **ROUTED)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    for part in ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        tensors[f"model.layers.2.{part}"] = torch.zeros(256)
    change(tmp_path, tensors, num_nextn_predict_layers=1)
    assert_opens_as_theirs(tmp_path)
