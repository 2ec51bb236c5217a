"""Adapters against PEFT: its files in ours, its logits and gradients, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.engine.config import ModelConfig
from warploom.engine.errors import InputError
from warploom.engine.formats.adapters import CONFIG, TENSORS, is_adapter
from warploom.engine.formats.model_directory import load_model, open_adapter
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer

TOKENS = torch.arange(58).view(2, 29) * 7 % 97
SHAPE = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": {}, "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=128), "phi3": {},
    "gpt_neox": dict(num_key_value_heads=None), "glm": dict(head_dim=16), "qwen2_moe": dict(num_experts=4),
}  # fmt: skip
"""Parts by names of their own, and packed: transposed, side by side, head by head, with rows in another order."""


def peft_model(base, **options):
    """A model of transformers with an adapter whose change is as large as its weights."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture
def published(tmp_path):
    """A directory with a random model of a family."""
    transformers = pytest.importorskip("transformers")

    def make(kind):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES[kind]})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapter_gives_logits_and_gradients_of_peft(published, tmp_path, kind):
    theirs, folder = peft_model(published(kind)), tmp_path / "adapter"
    theirs.save_pretrained(folder)
    ours, adapter = load_model(folder, "cpu")[0], open_adapter(folder)
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    wanted, found = theirs(inputs).logits, ours(inputs).detach()
    assert (found - load_model(tmp_path / kind, "cpu")[0](inputs)).abs().max() > 0.1, "or nothing was tested"
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    ours.train().losses(inputs, targets).cross_entropy.backward()
    torch.nn.functional.cross_entropy(wanted.flatten(0, 1), targets.flatten()).backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = {}
    for name, weight in adapter.weights.items():
        found |= weight.gradients(ours.get_parameter(name).grad, adapter.factors, adapter.scales)
    assert len(found) == len(wanted) >= 8
    for name, grad in found.items():
        other = wanted[f"base_model.model.{name}".replace(".weight", ".default.weight")]
        assert (grad - other).norm() <= 1e-5 * other.norm(), name


def test_adapter_options_give_pefts_logits(published, tmp_path):
    """rslora, ranks and alphas by layer, embedding and head saved whole."""
    theirs = peft_model(
        published("llama"), use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3},
        target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                p.mul_(1.5)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load_model(tmp_path / "adapter", "cpu")
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        assert (ours(TOKENS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture
def adapter(tmp_path):
    """An adapter in PEFT's files, made without PEFT."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=64)
    save_model(Transformer(config), tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(tmp_path / "base")}
    (folder / CONFIG).write_text(json.dumps(values))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    save_file(factors, folder / TENSORS)
    return folder


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"use_dora": True}, "use_dora=True is not supported: only plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model"),
        ({"r": 0}, "r=0 and lora_alpha=4 must be numbers"),
        ({"base_model_name_or_path": "gone"}, "is an adapter, and its model is not here: gone is not a directory"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ],
)
def test_adapter_of_another_kind_is_refused(adapter, changes, sentence):
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=sentence):
        load_model(adapter)


def test_adapter_of_another_model_is_refused(adapter, tmp_path):
    config = ModelConfig(vocab_size=97, d_model=48, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=64)
    save_model(Transformer(config), tmp_path / "base")
    with pytest.raises(InputError, match=r"is of another model than .*base: .*q_proj has factors of shape \(2, 32\)"):
        load_model(adapter)
    save_model(Transformer(config.replace(d_model=32, norm="layernorm", position="learned")), tmp_path / "base")
    with pytest.raises(InputError, match=r"which its model .*base has no layer for"):
        load_model(adapter)


def test_damaged_adapter_is_refused(adapter):
    tensors = load_file(adapter / TENSORS)
    (adapter / TENSORS).write_bytes((adapter / TENSORS).read_bytes()[:-40])
    with pytest.raises(InputError, match="is damaged or cut short"):
        load_model(adapter)
    name = next(iter(tensors))
    save_file({name: tensors[name]}, adapter / TENSORS)
    with pytest.raises(InputError, match="has only one of"):
        load_model(adapter)
    save_file(tensors | {name: tensors[name] * torch.nan}, adapter / TENSORS)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        load_model(adapter)


def test_directory_is_model_or_adapter_not_both(adapter):
    """A model written where an adapter was takes its place."""
    model, _ = load_model(adapter)
    save_model(model, adapter)
    assert not is_adapter(adapter) and torch.equal(load_model(adapter)[0](TOKENS), model(TOKENS))
