"""Model directories: what `transformers` writes we read, what we write it reads, and bad ones are refused clearly."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.engine.config import ModelConfig
from warploom.engine.formats.families import architecture_of
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_info import load_config
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer
from warploom.tokenizer.sources import unfinished

TOLERANCE = 1e-5
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
SHAPE = dict(vocab_size=96, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, max_seq_len=64)
CONFIGS = {
    "gpt2": dict(norm="layernorm", norm_eps=1e-5, position="learned", ffn="gelu", bias=True, n_kv_heads=None),
    "llama": dict(rope_theta=5e5, rope_scaling=LLAMA3),
    "llama untied, biased": dict(tie_embeddings=False, bias=True),
    "llama linear": dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
    "llama dynamic": dict(rope_scaling=dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=64)),
    "llama yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": dict(sliding_window=7),
    "qwen2": dict(qkv_bias=True),
    "qwen2 windowed": dict(qkv_bias=True, sliding_window=7),
    "qwen3": dict(qk_norm=True, head_dim=16, tie_embeddings=False),
    "mixtral": dict(n_experts=4, experts_per_token=2, tie_embeddings=False),
}
TOKENS = torch.arange(80).view(2, 40) * 7 % 96


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms and biases too: nothing that is 1 or 0 can hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + 0.02)
    return model.eval()


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_opens_ours_same_logits(name, tmp_path, transformers):
    """Transformers opens what we write and computes the same."""
    config = ModelConfig(**{**SHAPE, **CONFIGS[name]})
    assert architecture_of(config) == name.split()[0]
    ours = randomized(Transformer(config))
    save_model(ours, tmp_path / "model")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(ours(TOKENS), theirs.eval()(TOKENS).logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_model_opens_same_logits(name, tmp_path, transformers):
    """Theirs is built from their own config class, drawn by them, saved by them."""
    config = ModelConfig(**{**SHAPE, **CONFIGS[name]})
    save_model(Transformer(config), tmp_path / "shape")
    published = transformers.AutoConfig.from_pretrained(tmp_path / "shape")
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(published))
    theirs.save_pretrained(tmp_path / "model")
    ours, tokenizer = load_model(tmp_path / "model", device="cpu")
    assert tokenizer is None
    assert ours.config.replace(balance_loss=0, router_z_loss=0) == config.replace(balance_loss=0, router_z_loss=0)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("options", [dict(shard_bytes=40_000), dict(weights="bin")], ids=["shards", "bin"])
def test_shards_and_pickled_weights_come_back_bit_for_bit(options, tmp_path, transformers):
    ours = Transformer(ModelConfig(**SHAPE))
    save_model(ours, tmp_path / "model", **options)
    again, _ = load_model(tmp_path / "model", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(theirs.lm_head.weight, ours.embedding.weight)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_unpublished_architecture_round_trips(tmp_path):
    """An architecture nobody published round trips under our own name."""
    config = ModelConfig(**SHAPE, norm="none", position="sinusoidal", ffn="relu2", logit_softcap=10.0, shared_ff=48)
    ours = Transformer(config)
    save_model(ours, tmp_path / "model")
    again, _ = load_model(tmp_path / "model", device="cpu")
    assert again.config == config
    assert torch.equal(ours(TOKENS), again(TOKENS))


def test_weights_readable_like_config(tmp_path):
    """Weights may be read by whoever may read the config."""
    save_model(Transformer(ModelConfig(**SHAPE)), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_save_over_model_leaves_no_old_tensor(tmp_path):
    """Saving over a model leaves no tensor of the former one."""
    save_model(Transformer(ModelConfig(**SHAPE)), tmp_path, shard_bytes=40_000)
    (tmp_path / "notes.txt").write_text("mine")
    small = Transformer(ModelConfig(**{**SHAPE, "n_layers": 1}))
    save_model(small, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    assert load_config(tmp_path) == small.config


def test_a_failed_save_leaves_the_former_model_whole(tmp_path, monkeypatch):
    first = Transformer(ModelConfig(**SHAPE))
    save_model(first, tmp_path / "model")

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("warploom.engine.formats.model_writer.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_model(Transformer(ModelConfig(**SHAPE)), tmp_path / "model")
    again, _ = load_model(tmp_path / "model", device="cpu")
    assert torch.equal(again.embedding.weight, first.embedding.weight)
    assert os.listdir(tmp_path) == ["model"]


def test_save_killed_leaves_no_obstacle(tmp_path):
    """A save that was killed is not in the way of a process of the same number."""
    unfinished(tmp_path / "model").mkdir()
    (unfinished(tmp_path / "model") / "model-00001-of-00002.safetensors").write_text("half of")
    save_model(Transformer(ModelConfig(**SHAPE)), tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1


def edit_config(directory, **changes):
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "unknown kind": (lambda d: edit_config(d, model_type="bert"), "model_type 'bert'"),
    "missing field": (lambda d: edit_config(d, hidden_size=...), "no field 'hidden_size'"),
    "wrong activation": (lambda d: edit_config(d, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "wrong size": (lambda d: edit_config(d, intermediate_size=80), "mlp.*has shape"),
    "wrong heads": (lambda d: edit_config(d, num_key_value_heads=3), "n_kv_heads=3 does not divide"),
    "cut short": (truncate, "model.safetensors is damaged or cut short"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "missing tensor": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")),
        "model.safetensors has no tensor 'model.norm.weight'",
    ),
    "extra tensor": (lambda d: edit_tensors(d, lambda t: t.update(surprise=torch.ones(1))), "'surprise'"),
    "NaN": (
        lambda d: edit_tensors(d, lambda t: t["model.layers.1.mlp.down_proj.weight"][0].fill_(torch.nan)),
        "model.layers.1.mlp.down_proj.weight holds NaN",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_model_directory_damaged_refused_by_name(name, tmp_path):
    """A damaged directory is refused in one sentence that names the fault."""
    harm, message = DAMAGE[name]
    save_model(Transformer(ModelConfig(**SHAPE)), tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_model(Transformer(ModelConfig(**SHAPE)), tmp_path / "file")
