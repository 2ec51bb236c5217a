"""The one model on the fused kernels: it trains and generates as it does in eager PyTorch."""

from dataclasses import replace

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.formats.packed_weight import (
    PARTS,
    Layout,
    PackedExperts,
    PackedLinear,
    Segment,
    dequantize_lone_experts,
    install,
    is_packed,
    packed_in,
)
from warploom.engine.formats.rounding import nearest
from warploom.engine.generation import generate
from warploom.engine.model import Linear, Transformer
from warploom.engine.rl.policy import Policy, exact_obstacle, pack
from warploom.engine.rl.rollouts import Sample
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution.gpu_model import batch_invariant_linear, fused_model
from warploom.engine.serving.execution.kv_cache import PagedKVCache
from warploom.engine.serving.scheme import Scheme
from warploom.kernels import (
    backend,
    linear,
    linear_residual,
    moe,
    normed_linear,
    packed_linear_residual,
    packed_moe,
    packed_normed_linear,
)
from warploom.kernels.core.tuned import trying
from warploom.kernels.packed_linear import E2M1, PackedTensor, packed_linear, rotated

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
PROMPTS, GREEDY = [[1, 2, 3], [4] * 9, [5]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
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


def kernels_serve(llm, make=batch_invariant_linear, pages=torch.float32):
    """The engine with the model of a GPU, on whatever device there is."""
    model, runner = llm.plain_model, llm.engine.runner
    if DEVICE == "cpu":  # not C++ but the kernels
        latent = bool(model.config.kv_rank)
        runner.model, runner.least_tokens = fused_model(model, make, latent=latent), 1
        _, count, page_size = runner.store.keys.shape[:3]
        runner.store = PagedKVCache(model.config, count, page_size, pages, torch.device("cpu"), latent)
        runner.store.layers = None
    return llm


def serve(model, name, make=batch_invariant_linear, pages=torch.float32):
    """Three prompts together, by the model of a GPU, on whatever device there is."""
    llm = kernels_serve(LLM(model, max_batch=3, kv_memory=1 << 20, page_size=4), make, pages)
    with backend(name):
        outputs = llm.generate(PROMPTS, GREEDY)
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
        assert said == [tuple(generate(model, prompt, 4, temperature=0.0)) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("config", "pages"),
    [
        (DENSE, torch.int8),
        ({**DENSE, "qk_norm": False, "position": "learned"}, torch.float8_e4m3fn),
        (LATENT, torch.int8),
    ],
    ids=["llama", "no rotation", "latents"],
)
def test_pages_of_8_bits_serve_the_same(config, pages, monkeypatch):
    """By the kernels as by their references."""
    monkeypatch.setattr("warploom.engine.serving.execution.kv_cache.HAS_NATIVE", False)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**config, "n_layers": 1})).to(DEVICE).eval()
    assert serve(model, "triton", pages=pages) == serve(model, "eager", pages=pages)


@pytest.mark.parametrize("config", [DENSE, {**DENSE, "sliding_window": 5}], ids=["llama", "windows"])
@torch.no_grad()
def test_exact_policy_has_the_bits_that_were_sampled(config):
    """`rl --exact True` on a GPU: the trainer's log-probabilities are those of tokens decoded one by one.

    Thirteen tokens: the interpreter's product is NumPy's, which adds in another order from sixteen rows on.
    """
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**config)).to(DEVICE).eval()
    llm = kernels_serve(LLM(model, max_batch=3, kv_memory=1 << 20))
    assert exact_obstacle(model, llm, asked=True) is None and "not measured" in exact_obstacle(model, llm)
    prompts = [[1, 2, 3], [4] * 4]
    with backend("triton"):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True, seed=1, logprobs=0))
        samples = [
            Sample("", "", [*prompt, *output.token_ids], range(len(prompt), len(prompt) + 4),
                   [entry.logprob for entry in output.logprobs], True, advantage=1.0)
            for prompt, output in zip(prompts, outputs)
        ]  # fmt: skip
        packed = pack(samples, model.device)
        exact, plain = (
            policy.log_probs(policy.hidden(packed), packed.targets_S) for policy in (Policy(model, llm), Policy(model))
        )
    assert torch.equal(exact, packed.sampled_S)
    torch.testing.assert_close(plain, packed.sampled_S, atol=1e-4, rtol=1e-4)


LAYOUTS = [Layout(8, rotate=False), Layout(4, 32, True), Layout(4, 16, table=E2M1, rotate=False)]
FLOAT8 = Layout(8, rotate=False, float8=True)


@pytest.mark.parametrize("layout", [*LAYOUTS[:2], FLOAT8], ids=["8 bits", "4 bits rotated", "float8"])
def test_packed_weights_serve_the_same(layout):
    """On both backends, and as the model of dequantized weights serves by the kernels."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**DENSE)).to(DEVICE)
    packed = [serve(model, name, lambda w, b, _: PackedLinear(nearest(w, layout), b)) for name in ("triton", "eager")]
    plain = Transformer(model.config).to(DEVICE)
    plain.load_state_dict(model.state_dict())
    for layer in plain.blocks.modules():
        if type(layer) is Linear:
            layer.weight.data = nearest(layer.weight, layout).dequantize()
    assert packed[0] == packed[1] == serve(plain, "eager")


def test_float8_codes_are_torchs_numbers():
    """Each of 254 codes, by the kernel; the other two are NaN, and no weight has them."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    one, weight = torch.ones(256, 1, device=DEVICE), codes[:, None].expand(256, 16).contiguous()
    with backend("triton"):
        found = packed_linear(torch.eye(16, device=DEVICE), PackedTensor(weight, one.half(), None, one[:, 0], 8, 16))[3]
    real = ~codes.float().isnan()
    assert real.sum() == 254 and torch.equal(found[real], codes.float()[real])


def packed_experts(model, layout):
    """Let experts of a model be packed, in one stack a matrix; what they stand for."""
    found = []
    for index, block in enumerate(model.blocks):
        for name in ("w_gate_up", "w_down"):
            whole = getattr(block.ffn, name).detach()
            experts = PackedExperts(nearest(w, layout) for w in whole).stacked(DEVICE)
            assert experts[1].segments[0].codes.untyped_storage().data_ptr() == experts.stack.codes.data_ptr()
            install(model, f"blocks.{index}.ffn.{name}", experts)
            found.append(experts.dequantize())
    return found


@pytest.mark.parametrize("layout", [Layout(8, 32, rotate=False), Layout(4, 32, True)], ids=["8 bits", "4 bits rotated"])
def test_packed_experts_serve_the_same(layout):
    """On both backends, and as the model of dequantized experts serves by the kernels."""
    torch.manual_seed(0)
    config = ModelConfig(**{**SPARSE, "n_layers": 1})
    packed, plain = Transformer(config).to(DEVICE), Transformer(config).to(DEVICE)
    plain.load_state_dict(packed.state_dict())
    for weight, numbers in zip(
        (plain.blocks[0].ffn.w_gate_up, plain.blocks[0].ffn.w_down), packed_experts(packed, layout)
    ):
        weight.data = numbers
    said = serve(packed, "triton")
    assert said == serve(packed, "eager") == serve(plain, "eager")


def test_lone_packed_experts_are_widened():
    """The kernel of packed experts takes both matrices of a layer or neither: beside floats a packed one is widened."""
    model = Transformer(ModelConfig(**SPARSE)).to(DEVICE)
    numbers = packed_experts(model, LAYOUTS[0])
    install(model, "blocks.0.ffn.w_down", PackedExperts(nearest(w, LAYOUTS[0]) for w in numbers[1].cpu()))
    dequantize_lone_experts(model)
    assert [name for name, _ in packed_in(model)] == ["blocks.1.ffn.w_gate_up", "blocks.1.ffn.w_down"]
    kept = model.state_dict()
    assert torch.equal(kept["blocks.0.ffn.w_gate_up"], numbers[0]) and "blocks.0.ffn.w_down" in kept
    assert model.blocks[0].ffn.product is None


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8", Scheme(4, 32)], ids=str)
def test_quantize_packs_experts(quantize, monkeypatch):
    """`quantize=` where products are the kernels': experts are codes, and serve as the numbers that these stand for."""
    for room in ("llm", "execution.kv_cache", "execution.serving_model"):
        monkeypatch.setattr(f"warploom.engine.serving.{room}.HAS_NATIVE", False)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SPARSE, "n_layers": 1})).to(DEVICE).eval()
    plain = Transformer(model.config).to(DEVICE).eval()
    said = []
    for name in ("triton", "eager"):
        llm = LLM(model, max_batch=3, kv_memory=1 << 20, quantize=quantize, kv_dtype="float32")
        with backend(name):
            said.append([each.token_ids for each in llm.generate(PROMPTS, GREEDY)])
    packed = dict(packed_in(llm.model))
    assert {f"blocks.0.ffn.{part}" for part in ("w_gate_up", "w_down", "router.weight")} < packed.keys()
    assert packed["blocks.0.ffn.w_down"].stack is not None and not is_packed(model)
    numbers = {name: weight.dequantize() for name, weight in packed.items()}
    plain.load_state_dict({**model.state_dict(), **numbers})
    assert isinstance(llm.engine.runner.head.logits, PackedLinear)
    plain_llm = LLM(plain, max_batch=3, kv_memory=1 << 20)
    plain_llm.engine.runner.head = llm.engine.runner.head
    with backend("eager"):
        said.append([each.token_ids for each in plain_llm.generate(PROMPTS, GREEDY)])
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["8 bits", "4 bits, minima", "table"])
def test_packed_experts_are_those_of_widened_weights(layout, tokens):
    """In every bit, where sums take as many columns at a time."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SPARSE, "d_model": 64, "d_ff": 128, "n_layers": 1}))
    moe_layer, layout = model.blocks[0].ffn.to(DEVICE), replace(layout, rotate=False)
    packed_experts(model, layout)
    x, logits = torch.randn(tokens, 64).bfloat16().to(DEVICE), torch.randn(tokens, 4).to(DEVICE)
    packed = [part.stack.tensor for part in (moe_layer.w_gate_up, moe_layer.w_down)]
    weights = [part.dequantize().bfloat16() for part in (moe_layer.w_gate_up, moe_layer.w_down)]
    with backend("triton"), trying("moe_gate", {"BLOCK_K": 64}), trying("moe_down", {"BLOCK_K": 64}):
        assert torch.equal(packed_moe(x, logits, *packed, 4, 2)[0], moe(x, logits, *weights, 2)[0])


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["8 bits", "4 bits rotated", "table"])
def test_packed_product_is_that_of_the_widened_weight(layout, rows):
    """In every bit, in few rows and in many; rotated weights meet rotated activations."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (40, 64 * layout.bits // 8), dtype=torch.uint8, generator=generator)
    scales, minima = torch.rand(2, 40, 64 // layout.group, generator=generator).half()
    segment = Segment(layout, codes, scales, minima if layout.minimum else None, torch.ones(40)).to(DEVICE)
    x = torch.randn(rows, 64, generator=generator).bfloat16().to(DEVICE)
    plain = Segment(replace(layout, rotate=False), *(getattr(segment, part) for part in PARTS)).dequantize().bfloat16()
    turned = rotated(x.float()).bfloat16() if layout.rotate else x
    squares, norm = x.float().square().sum(-1, keepdim=True), torch.randn(40, generator=generator).bfloat16().to(DEVICE)
    streams = torch.zeros(2, rows, 40, dtype=torch.bfloat16, device=DEVICE)
    with backend("triton"):
        assert torch.equal(segment.multiply(x, None), linear(turned, plain))
        normed = packed_normed_linear(x, squares, segment.tensor)
        assert torch.equal(normed, normed_linear(turned, squares, plain))
        joined = packed_linear_residual(x, segment.tensor, streams[0], norm), streams[0]
        meant = linear_residual(turned, plain, streams[1], norm), streams[1]
        assert all(torch.equal(a, b) for a, b in zip((*joined[0], joined[1]), (*meant[0], meant[1])))
