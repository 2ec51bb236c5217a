"""Every published family, both ways: the logits of `transformers`, from its files and into them.

Random tiny models, float32, sequences longer than any window; nothing that is 1 or 0 can hide a mistake.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from warploom.engine.formats.families import architecture_of, family_table, from_hf_config, to_hf_config, weight_map
from warploom.engine.formats.family import full
from warploom.engine.formats.family_table import FAMILIES
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution import kv_cache, serving_model
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.training import fused_block
from warploom.kernels import backend
from warploom.kernels.core.lang import HAS_TRITON, INTERPRET

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TOLERANCE = 2e-5  # of the largest logit
TOKENS = torch.arange(58).view(2, 29) * 7 % 97
SHAPE = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SMALL_GPT = dict(n_embd=64, n_layer=4, n_head=4, n_positions=128, rotary_dim=8)
MOE = dict(num_local_experts=8, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40)
ROUTED = dict(
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, n_group=4, topk_group=2, n_shared_experts=2,
    first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, num_key_value_heads=4
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
    rope_theta=5e5,
)  # fmt: skip
GROWTH = dict(llama_4_scaling_beta=0.6, mscale=1.0, mscale_all_dim=1.0)
HYBRID = dict(sliding_window=6, layer_types=["sliding_attention"] * 3 + ["full_attention"])
GRANITE = dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.05)


def by_kind(full, local_theta=1e4):
    return dict(
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta}, "full_attention": full,
        }
    )  # fmt: skip


def longrope(original):
    waves = dict(short_factor=[1 + i / 10 for i in range(6)], long_factor=[2 + i * 0.3 for i in range(6)])
    parameters = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, **waves)
    return dict(
        original_max_position_embeddings=original,
        rope_parameters=parameters | dict(original_max_position_embeddings=original),
    )


CONFIGS = {
    "gpt2": SMALL_GPT,
    "llama": {},
    "llama, attention biases": dict(attention_bias=True),
    "llama, llama3 rope": dict(rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=7, head_dim=32),
    "ministral": dict(head_dim=16, sliding_window=7, layer_types=["sliding_attention", "full_attention"] * 2),
    "ministral3": dict(head_dim=16, rope_parameters=YARN | dict(original_max_position_embeddings=8) | GROWTH),
    "mixtral": MOE,
    "qwen2": {},
    "qwen2, mixed": dict(use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3": dict(head_dim=32),
    "qwen2_moe": MOE | dict(shared_expert_intermediate_size=72),
    "qwen3_moe": MOE | dict(norm_topk_prob=True, head_dim=32),
    "gemma": dict(head_dim=32),
    "gemma2": dict(head_dim=32, sliding_window=6, query_pre_attn_scalar=24),
    "gemma3_text": dict(head_dim=32, query_pre_attn_scalar=24)
    | HYBRID
    | by_kind(dict(rope_type="linear", factor=8.0, rope_theta=1e6)),
    "vaultgemma": dict(head_dim=16, sliding_window=6),
    "phi": dict(num_key_value_heads=4),
    "phi3": {},
    "phi3, short": longrope(128),
    "phi3, long": longrope(16),
    "olmo": {},
    "olmo2": {},
    "olmo3": HYBRID | by_kind(YARN, 5e5),
    "olmoe": MOE,
    "smollm3": {},
    "gpt_neox": dict(num_key_value_heads=4),
    "gpt_neox, serial": dict(num_key_value_heads=4, use_parallel_residual=False),
    "gptj": SMALL_GPT,
    "stablelm": dict(use_qkv_bias=True),
    "stablelm, parallel": dict(use_parallel_residual=True),
    "starcoder2": dict(sliding_window=7),
    "cohere": {},
    "cohere2": HYBRID,
    "granite": GRANITE,
    "granitemoe": MOE | GRANITE,
    "hyperclovax": GRANITE | dict(logits_scaling=0.25, use_post_norm=True),
    "glm": dict(head_dim=16),
    "glm4": dict(head_dim=16),
    "glm4_moe": ROUTED | dict(use_qk_norm=True, attention_bias=True, head_dim=16),
    "dots1": ROUTED | dict(head_dim=16),
    "solar_open": ROUTED | dict(head_dim=16),
    "seed_oss": dict(head_dim=16),
    "exaone4": HYBRID,
    "exaone4, full": dict(sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 4),
    "exaone_moe": ROUTED | HYBRID | dict(num_experts=8, num_shared_experts=1, head_dim=16),
    "ernie4_5": dict(head_dim=16),
    "ernie4_5_moe": dict(
        moe_num_experts=8, moe_k=3, moe_intermediate_size=40, moe_layer_end_index=3, moe_layer_start_index=1
    ),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_dense, alpha": dict(
        head_dim=16, rope_parameters=dict(rope_type="dynamic", alpha=50.0, rope_theta=1e4, factor=1.0)
    ),
    "hunyuan_v1_moe": dict(num_experts=8, moe_topk=3, head_dim=16),
    "nemotron": dict(head_dim=16),
    "arcee": {},
    "jais2": {},
    "helium": dict(head_dim=16),
    "minimax_m2": MOE
    | dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "cwm": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=LLAMA3),
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=False, ffn_hidden_size=96),
    "falcon, 7b": dict(alibi=False, bias=False, ffn_hidden_size=96),
    "gpt_oss": MOE | dict(head_dim=16, sliding_window=6, rope_parameters=YARN | dict(truncate=False)),
    "deepseek_v2": ROUTED | LATENT | dict(topk_method="group_limited_greedy", norm_topk_prob=False),
    "deepseek_v2, lite": ROUTED | LATENT | dict(topk_method="greedy", norm_topk_prob=False, q_lora_rank=None),
    "deepseek_v3": ROUTED | LATENT | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    "glm4_moe_lite": ROUTED | LATENT | dict(n_group=1, topk_group=1),
}


def their_model(name):
    """A random model of theirs: attention as text, so that windows, caps and sinks are all there."""
    kind, torch_seed = name.split(",")[0], 0
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **CONFIGS[name]})
    config._attn_implementation = "eager"
    torch.manual_seed(torch_seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    learned = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if "correction" in n}
    with torch.no_grad():
        for key, tensor in learned.items():
            centered = tensor.ndim == 1 and key.endswith("norm.weight") and not FAMILIES[kind].offset
            spread = 0.3 if tensor.ndim == 1 or "correction" in key else 0.12
            tensor.copy_(torch.randn_like(tensor) * spread + float(centered))
    return model


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(theirs.abs().max())))


def test_every_family_is_tested():
    assert {name.split(",")[0] for name in CONFIGS} == set(FAMILIES)
    assert len(FAMILIES) >= 50


@pytest.mark.parametrize("name", CONFIGS)
def test_family_opens_and_saves(name, tmp_path):
    """transformers → ours → transformers, as this family and as whichever is the first to fit."""
    kind = name.split(",")[0]
    theirs = their_model(name)
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_model(tmp_path / "theirs", device="cpu")
    with torch.no_grad():
        assert_same(ours(TOKENS), wanted)

    loss = ours.train().loss(TOKENS[:, :-1], TOKENS[:, 1:])
    loss.backward()
    still = [key for key, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert loss.isfinite() and not still
    assert ours.config.parameter_count() == sum(p.numel() for p in ours.parameters())

    save_model(ours.eval(), tmp_path / "ours")
    assert full(load_model(tmp_path / "ours", device="cpu")[0].config) == full(ours.config)
    save_model(ours, tmp_path / "named")
    _save_as(kind, ours, tmp_path / "named")
    for directory in {"ours", "named"} if architecture_of(ours.config) != kind else {"named"}:
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / directory, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            assert_same(again.eval()(TOKENS).logits, wanted)


@pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", CONFIGS)
def test_family_on_triton_kernels(name, tmp_path, monkeypatch):
    """Interpreted, on more tokens than any window; the one op that some family leaves to PyTorch is named."""
    left, module = [], importlib.import_module("warploom.kernels.moe")
    unfused = module._moe_unfused
    monkeypatch.setattr(
        module, "_moe_unfused", lambda *args, **options: left.append("moe") or unfused(*args, **options)
    )
    their_model(name).save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, device="cpu")
    tokens = TOKENS[:1, :8]
    with torch.no_grad():
        expected = ours(tokens)
        with backend("triton"):
            assert_same(ours(tokens), expected)
    assert set(left) == ({"moe"} if name == "gpt_oss" else set())


def step_of(model, loss_of):
    """Loss before and after a step of plain gradient descent."""
    losses = []
    for _ in range(2):
        losses.append(loss_of())
        model.zero_grad(set_to_none=True)
        losses[-1].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad if parameter.grad is not None else 0
    return torch.stack(losses).detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_family_trains_and_writes_alike(name, tmp_path, monkeypatch):
    """One step of training, by the definition and by the fused block, and greedy tokens, by C++ and by PyTorch."""
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    prompt, count = TOKENS[1].tolist(), 10
    with torch.no_grad():
        wanted = theirs.generate(TOKENS[1:], max_new_tokens=count, do_sample=False, use_cache=False, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()
    for native in (True, False):
        monkeypatch.setattr(serving_model, "HAS_NATIVE", native and HAS_NATIVE)
        monkeypatch.setattr(kv_cache, "HAS_NATIVE", native and HAS_NATIVE)
        ours, _ = load_model(tmp_path, device="cpu")
        llm = LLM(ours, max_batch_tokens=16, max_batch=2, page_size=8)
        output = llm.generate(prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
        assert list(output.token_ids) == wanted

    tokens = TOKENS.clamp(min=1)  # their padding token learns nothing
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = step_of(theirs, lambda: F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()))
    for fused in (False, True):
        model, _ = load_model(tmp_path, device="cpu")
        if fused:
            fused_block.install(model)
        losses = step_of(model.eval(), lambda model=model: model.losses(inputs, targets).cross_entropy)
        torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert expected[1] < expected[0]


def _save_as(kind, model, directory):
    """Over a saved model: the same as a given family."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        (piece,) = weight_map(model.config, [name], kind)
        tensors |= dict(piece.split(parameter.detach()))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(to_hf_config(model.config, kind)))


SIZES = ("expert", "moe", "rank", "head_dim", "n_embd", "n_layer", "n_head", "n_positions", "rotary_dim", "kv_heads")


@pytest.mark.parametrize("kind", FAMILIES)
def test_family_assumes_what_its_class_does(kind):
    """A config.json with nothing but sizes means to us what it means to their class."""
    sizes = {key: value for key, value in SHAPE.items() if "token" not in key}
    sizes |= {key: value for key, value in CONFIGS[kind].items() if any(word in key for word in SIZES)}
    sizes |= {"num_key_value_heads": 4} if kind in ("phi", "gpt_neox") or "kv_lora_rank" in sizes else {}
    sizes |= {"n_group": 4, "topk_group": 2} if kind == "deepseek_v3" else {}
    whole = transformers.AutoConfig.for_model(kind, **sizes).to_dict()
    assert full(from_hf_config({"model_type": kind, **sizes})) == full(from_hf_config(whole))


def test_page_of_models_has_the_table():
    """As `warploom inspect families` prints it."""
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert page.endswith("\n".join(family_table()) + "\n")
