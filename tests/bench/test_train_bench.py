"""The training bench compares what it says: the same architecture, tokens and step, ours and theirs."""

import math

import pytest
import torch

from warploom.bench import peers
from warploom.bench.harness import Machine, Options
from warploom.bench.peers._plain import PlainTransformer
from warploom.bench.train import Shape, compare_step, parts
from warploom.engine.formats.families import to_hf_config

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 64, "max_seq_len": 16}


@pytest.fixture
def machine() -> Machine:
    machine = Machine("cpu", rounds=1)
    machine.ceilings |= {"matmul float32": 1e11, "matmul bfloat16": 1e11}
    return machine


def test_train_bench_same_tokens_plausible_loss(machine):
    """Every contestant trains on the same tokens at a plausible loss."""
    rows = {row.who: row for row in compare_step(machine, "llama-tiny", batch=2, time=16, dtype="float32", **TINY)}
    assert {"ours", "torch", "transformers"} <= set(rows)
    for row in rows.values():
        if row.missing and "not installed" in row.missing:
            continue
        assert row.missing is None
        assert row.extra["loss"] == pytest.approx(math.log(64), abs=1.5)
        assert row.limits["matmul float32"] > 0
        assert row.unit == "tok" and row.extra["first_seconds"] > 0


def test_bfloat16_that_is_emulated_is_not_measured(machine):
    (row,) = compare_step(machine, "llama-tiny", batch=1, time=16, dtype="bfloat16", **TINY)
    assert "no faster than float32" in row.missing


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-124m"])
def test_the_plain_peer_has_the_size_of_the_architecture(preset):
    config = Shape(preset, (("n_layers", 2),), 1, 16, "float32", "cpu").model
    with torch.device("meta"):
        plain = PlainTransformer(config, 16)
    assert sum(p.numel() for p in plain.parameters()) == config.parameter_count()


def test_plain_peer_equals_transformers():
    """The plain peer computes what transformers computes."""
    transformers = pytest.importorskip("transformers")
    config = Shape("llama-tiny", tuple(TINY.items()), 1, 16, "float32", "cpu").model
    values = to_hf_config(config)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    )
    plain = PlainTransformer(config, 16)
    weights = theirs.state_dict()
    copy = {"embedding.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"]}
    names = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "out": ["self_attn.o_proj"]}
    names |= {"up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
    names |= {"attention_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"]}
    for ours, pieces in names.items():
        copy[f"blocks.0.{ours}.weight"] = torch.cat([weights[f"model.layers.0.{piece}.weight"] for piece in pieces])
    copy["head.weight"] = copy["embedding.weight"]
    plain.load_state_dict(copy)
    tokens, targets = next(Shape("llama-tiny", tuple(TINY.items()), 2, 16, "float32", "cpu").batches())
    logits = theirs(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(plain(tokens, targets), expected, rtol=1e-5, atol=1e-5)


def test_parts_name_real_shapes_on_each_device(monkeypatch):
    monkeypatch.setattr("warploom.bench.environment._sees_gpu", lambda: True)
    for device in ("cpu", "cuda"):
        for part in parts(Options(device=device)):
            settings = dict(part.config)
            settings.pop("compiled", None)
            overrides = {name: settings.pop(name) for name in list(settings) if name in TINY}
            assert set(settings) == {"preset", "batch", "time", "dtype"}
            shape = Shape(settings["preset"], tuple(overrides.items()), 1, 1, "float32", device)
            assert shape.model.max_seq_len >= settings["time"]


def test_a_compiled_peer_is_named_so():
    shape = Shape("llama-tiny", tuple(TINY.items()), 1, 16, "float32", "cpu")
    assert "torch compiled" in peers.build("train", shape, compiled=True, only=["torch"])
