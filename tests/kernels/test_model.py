"""The one model on the fused kernels: it trains and generates as it does in eager PyTorch."""

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.generation import generate
from warploom.engine.model import Transformer
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution.gpu_model import BatchInvariantLinear, fused_model
from warploom.engine.serving.execution.kv_cache import PagedKVCache
from warploom.kernels import backend

from .device import DEVICE, pytestmark  # noqa: F401

DENSE = {
    "vocab_size": 61,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 32,
    "qk_norm": True,
}
LATENT = {
    "vocab_size": 61,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 32,
    "head_dim": 24,
    "kv_rank": 16,
    "q_rank": 20,
    "rope_dim": 8,
    "value_dim": 12,
}
SPARSE = {**DENSE, "n_experts": 4, "experts_per_token": 2, "d_ff": 32}


def train(config, name, steps=2, autocast=False):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**config)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    tokens = torch.randint(0, 61, (2, 9)).to(DEVICE)
    losses = []
    with backend(name):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        written = generate(model.eval(), tokens[0, :5].tolist(), 3, temperature=0.0)
    return losses, list(written)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["llama", "mixtral"])
def test_backends_learn_and_write_the_same(config):
    """A model learns and writes the same on both backends."""
    losses, text = train(config, "triton")
    expected, expected_text = train(config, "eager")
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    assert text == expected_text


def test_so_it_learns_under_autocast():
    losses, expected = (train(DENSE, name, autocast=True)[0] for name in ("triton", "eager"))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses[-1] < losses[0]


def serve(model, name):
    """Three prompts together, by the model of a GPU, on whatever device there is."""
    llm = LLM(model, max_batch=3, kv_memory=1 << 20, page_size=4)
    runner = llm.engine.runner
    if DEVICE == "cpu":  # not C++ but the kernels
        latent = bool(model.config.kv_rank)
        runner.model, runner.least_tokens = fused_model(model, BatchInvariantLinear, latent=latent), 1
        pages = runner.store.keys.shape[1]
        runner.store = PagedKVCache(model.config, pages, 4, torch.float32, torch.device("cpu"), latent)
        runner.store.layers = None
    with backend(name):
        outputs = llm.generate([[1, 2, 3], [4] * 9, [5]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        SPARSE,
        {**SPARSE, "attention_sinks": True},
        LATENT,
        {**LATENT, "n_heads": 5, "layers": "wf", "sliding_window": 5},
    ],
    ids=["llama", "mixtral", "sinks", "latents", "latents in windows"],
)
def test_backends_serve_pages_the_same(config):
    """A model serves the same from pages on both backends, which is what it says by itself."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**config)).to(DEVICE).eval()
    with torch.no_grad():
        for block in model.blocks:
            if block.attention.sinks is not None:
                block.attention.sinks.normal_()
    said = serve(model, "triton")
    assert said == serve(model, "eager")
    with backend("eager"):
        assert said == [tuple(generate(model, prompt, 4, temperature=0.0)) for prompt in ([1, 2, 3], [4] * 9, [5])]
