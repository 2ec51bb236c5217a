"""The one Transformer: every architecture learns, remembers what it cached, and starts at unit scale."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from warploom.engine.config import PRESETS, ModelConfig
from warploom.engine.errors import InputError
from warploom.engine.generation import KVCache, generate
from warploom.engine.model import Block, Transformer, dense_attention

NORMS = ("rmsnorm", "layernorm", "none")
POSITIONS = ("rope", "learned", "sinusoidal", "none")
FFNS = ("swiglu", "gelu", "relu", "relu2")
SMALL = dict(vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)
VARIANTS = {
    "llama": {},
    "gpt2": dict(norm="layernorm", position="learned", ffn="gelu", bias=True, n_kv_heads=None),
    "qwen3": dict(qk_norm=True, tie_embeddings=False, head_dim=16),
    "multi-query, windowed": dict(n_kv_heads=1, sliding_window=5),
    "soft-capped": dict(attention_softcap=5.0, logit_softcap=3.0),
    "sinusoidal": dict(position="sinusoidal", norm="none", ffn="relu2"),
    "no positions": dict(position="none"),
    "ntk": dict(rope_scaling={"rope_type": "ntk", "factor": 4.0}),
    "mixtral": dict(n_experts=4),
    "switch with a shared expert": dict(n_experts=4, experts_per_token=1, shared_ff=48, router="sigmoid"),
}


def make(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**SMALL, **changes}))


def tokens(batch: int = 2, time: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_experts", [0, 3], ids=["dense", "moe"])
@pytest.mark.parametrize("norm, position, ffn", list(itertools.product(NORMS, POSITIONS, FFNS)))
def test_every_architecture_overfits_one_batch(norm, position, ffn, n_experts):
    """Every corner of the architecture overfits one batch."""
    model = make(norm=norm, position=position, ffn=ffn, n_experts=n_experts)
    data = tokens(batch=2, time=9, seed=3)
    data[1] = data[0].flip(0)  # order matters: without positions, causality must tell
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=80)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(data[:, :-1], data[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert model.losses(data[:, :-1], data[:, 1:]).cross_entropy < 0.1


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_cached_and_uncached_forward_agree(name):
    model, data = make(**VARIANTS[name]).eval(), tokens()
    cache = KVCache(model, batch=2)
    parts = [model(part, cache.positions(part.shape[1]), cache) for part in data.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(data), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_no_token_sees_a_later_one(name):
    model, data = make(**VARIANTS[name]).eval(), tokens()
    changed = data.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % SMALL["vocab_size"]
    before, after = model(data), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-5, rtol=0)  # experts sum in other company
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_the_cross_entropy_of_the_logits(name):
    model, data = make(**VARIANTS[name]).eval().double(), tokens()
    targets = data.roll(-1, 1).masked_fill(data == 3, -100)
    losses = model.losses(data, targets, label_smoothing=0.1)
    expected = F.cross_entropy(model(data).flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(losses.cross_entropy, expected, atol=1e-9, rtol=1e-9)


def test_log_probs_and_weighted_loss_equal_logits():
    """Log probs and a weighted loss follow from the logits."""
    model = make(logit_softcap=3.0).double()
    inputs, targets = tokens(time=9), tokens(time=9, seed=1)
    targets[0, 3:] = -100
    weights = torch.randn(2, 9, dtype=torch.float64)
    counted = targets != -100
    table = torch.log_softmax(model(inputs), -1)
    expected = table.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * counted
    torch.testing.assert_close(model.log_probs(inputs, targets), expected)
    theirs = -(expected * weights).sum() / counted.sum()
    ours = model.losses(inputs, targets, weights_BT=weights).total
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs))):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-1b", "qwen3-0.6b", "mixtral-8x7b", *VARIANTS])
def test_sizes_by_arithmetic_equal_those_of_the_tensors(name):
    config = ModelConfig.preset(name) if name in PRESETS else ModelConfig(**{**SMALL, **VARIANTS[name]})
    with torch.device("meta"):
        model = Transformer(config)
    assert config.parameter_count() == sum(parameter.numel() for parameter in model.parameters())


def test_preset_sizes_are_the_published_ones():
    millions = {name: round(ModelConfig.preset(name).parameter_count() / 1e6) for name in PRESETS}
    published = {"gpt2-124m": 124, "llama-1b": 1236, "llama-8b": 8030, "qwen3-0.6b": 596, "mixtral-8x7b": 46703}
    assert published.items() <= millions.items()


@pytest.mark.parametrize("depth", [2, 12, 64])
@torch.no_grad()
def test_the_stream_keeps_unit_scale_at_any_depth(depth):
    model = make(d_model=128, n_layers=depth, tie_embeddings=False)
    stream, delta = model.embedding(tokens(4, 32)), torch.zeros(())
    for block in model.blocks:
        stream, delta, _ = block(stream, delta, lambda q, k: (q, k), dense_attention)
        assert 0.5 < (stream + delta).square().mean().sqrt() < 2.0
    assert 0.5 < model(tokens(4, 32)).std() < 2.0


def test_gradients_reach_every_parameter():
    """Gradients reach every parameter at comparable scale."""
    model, data = make(n_layers=16, d_model=64, tie_embeddings=False), tokens(8, 24)
    model.loss(data[:, :-1], data[:, 1:]).backward()
    norms = [block.ffn.down.weight.grad.norm() for block in model.blocks]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert max(norms) < 10 * min(norms)


def test_a_model_built_on_the_meta_device_comes_to_life():
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SMALL))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(0)
    model.to_empty(device="cpu").init_weights()
    assert torch.equal(model(tokens()), make()(tokens()))


def test_dropout_acts_in_training_only():
    model, data = make(dropout=0.5), tokens()
    assert not torch.equal(model(data), model(data))
    model.eval()
    assert torch.equal(model(data), model(data))


def test_balance_losses_even_is_1_train_router():
    """Balance losses are one when even and train the router."""
    model, data = make(n_experts=4), tokens(8, 24)
    losses = model.losses(data, data)
    assert losses.expert_load.shape == (2, 4) and losses.expert_load.sum(1).tolist() == [8 * 24 * 2] * 2
    assert 0.99 <= losses.balance < 4
    losses.balance.backward()
    assert all(block.ffn.router.weight.grad.any() for block in model.blocks)


def test_seed_fixes_text_temperature_0_greedy():
    """The same seed gives the same text and temperature zero is greedy."""
    model = make().eval()
    drawn = [list(generate(model, [1, 2], 12, seed=seed)) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    text = [1, 2]
    for _ in range(6):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert list(generate(model, [1, 2], 6, temperature=0.0)) == text[2:]
    assert len(list(generate(model, [1, 2], 1000))) == SMALL["max_seq_len"] - 2
    stopped = list(generate(model, [1, 2], 6, temperature=0.0, stop=[text[-1]]))
    assert stopped == text[2 : text.index(text[-1], 2)]


def test_a_block_stands_alone():
    config = ModelConfig(**SMALL)
    x = torch.randn(2, 5, config.d_model)
    stream, delta, routing = Block(config)(x, torch.zeros_like(x), lambda q, k: (q, k), dense_attention)
    assert stream.shape == delta.shape == x.shape and routing is None


BAD_CONFIGS = {
    "vocab_size": (dict(vocab_size=0), "vocab_size must be at least 1, not 0"),
    "heads": (dict(n_heads=5), "n_heads=5 does not divide d_model=32"),
    "kv heads": (dict(n_kv_heads=3), "n_kv_heads=3 does not divide n_heads=4"),
    "norm": (dict(norm="batch"), "norm must be one of"),
    "odd rope": (dict(head_dim=7), "must be even, not 7"),
    "dropout": (dict(dropout=1.5), r"dropout must be in \[0, 1\), not 1.5"),
    "experts": (dict(n_experts=2, experts_per_token=3), "between 1 and n_experts=2, not 3"),
    "scaling": (dict(rope_scaling={"rope_type": "magic"}), "must be one of .* not 'magic'"),
    "scaling without a factor": (
        dict(rope_scaling={"rope_type": "linear"}),
        "of linear must be a number",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_config_impossible_refused_by_field(name):
    """An impossible architecture is refused by field and value."""
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_misuse_of_a_model_is_refused_with_the_numbers():
    model = make()
    with pytest.raises(ValueError, match="33 tokens is longer than the model's max_seq_len=32"):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match="targets have shape"):
        model.loss(tokens(1, 5), tokens(1, 6))
    with pytest.raises(ValueError, match=r"do not fit the cache of 8 \(the model's max_seq_len is 32\)"):
        KVCache(model, 1, capacity=8).positions(9)
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generate(model, [], 5))
    with pytest.raises(ValueError, match="preset 'llama-9000b' is not known"):
        ModelConfig.preset("llama-9000b")
    with pytest.raises(ValueError, match="ModelConfig has no field d_modle"):
        ModelConfig.from_dict({"vocab_size": 5, "d_modle": 3})
