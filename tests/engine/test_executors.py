"""Executors compute what they say they do; whatever they do not know falls back to the definition."""

import copy
import dataclasses

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.executors import Supported
from warploom.engine.model import Block, Transformer
from warploom.engine.parallel import tensor_parallel
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution import gpu_model, outlier_smoothing, serving_model
from warploom.engine.serving.execution.kv_cache import PagedKVCache
from warploom.engine.training import fused_block

SHAPE = {"vocab_size": 32, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}


@dataclasses.dataclass(frozen=True)
class Tomorrow(ModelConfig):
    """A configuration with a field that no executor has heard of."""

    twist: float = 1.0


def test_supported_refuses_a_field_it_never_heard_of():
    assert fused_block.is_supported(Tomorrow(**SHAPE))
    assert not fused_block.is_supported(Tomorrow(**SHAPE, twist=2.0))
    assert fused_block.is_supported.refused(Tomorrow(**SHAPE, twist=2.0)) == {"twist": 2.0}


def test_supported_joins_lists_and_conditions():
    even = Supported(SHAPE, {"norm": ("layernorm", "none")}, lambda c: c.n_layers % 2 == 0)
    assert even(ModelConfig(**SHAPE, norm="none"))
    assert not even(ModelConfig(**SHAPE))  # a list says all: the default is not in this one
    assert not even(ModelConfig(**SHAPE | {"n_layers": 3}, norm="none"))


@pytest.mark.skipif(
    not fused_block.fused_block.HAS_FUSED_BLOCK, reason="needs the C++ extension and a CPU with AVX-512"
)
def test_fused_block_leaves_replaced_parts_alone():
    model = Transformer(ModelConfig(**SHAPE))
    model.blocks[1].ffn = torch.nn.Identity()
    fused_block.install(model)
    assert [type(block) for block in model.blocks] == [fused_block.FusedBlock, Block]


def test_sharding_refuses_a_field_it_never_heard_of():
    with pytest.raises(ValueError, match=r"tp and ep cannot shard a model with twist=2\.0"):
        tensor_parallel.check(Tomorrow(**SHAPE, twist=2.0), tp=2)
    tensor_parallel.check(Tomorrow(**SHAPE, twist=2.0), tp=1)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_serving_falls_back_from_an_unknown_field(quantize):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).eval()
    expected = model(torch.arange(8)[None])
    model.config = Tomorrow(**SHAPE, twist=2.0)
    served, head = serving_model.serving_model(model, quantize)
    assert not isinstance(served, serving_model.NativeTransformer)
    tolerance = 0.1 if quantize else 1e-4
    torch.testing.assert_close(head(served.hidden(torch.arange(8)[None])), expected, rtol=tolerance, atol=tolerance)
    assert not any(type(m) is gpu_model.PagedAttention for m in gpu_model.fused_model(model, None).modules())


EXECUTORS = {
    "fused block": fused_block.is_supported,
    "native decoder": serving_model.NativeTransformer.is_supported,
    "native experts": serving_model.NativeExperts.is_supported,
    "paged attention": gpu_model.PagedAttention.is_supported,
    "fused block of a GPU": gpu_model.FusedBlock.is_supported,
    "norms in products": gpu_model.FusedBlock.is_supported,
    "outlier smoothing": outlier_smoothing.is_supported,
    "tensor parallel": tensor_parallel.is_supported,
}
TINY = dict(vocab_size=61, d_model=64, n_layers=3, n_heads=4, max_seq_len=64, d_ff=96)
MOE = dict(n_experts=6, d_ff=48)
# For every field of a configuration, models in which it matters.
MODELS = {
    "vocab_size": dict(vocab_size=53),
    "d_model": dict(d_model=128),
    "n_layers": dict(n_layers=1),
    "n_heads": dict(n_heads=2),
    "n_kv_heads": dict(n_kv_heads=2),
    "head_dim": dict(head_dim=24),
    "d_ff": dict(d_ff=80),
    "max_seq_len": dict(max_seq_len=48),
    "layers": dict(layers="wfn", sliding_window=5),
    "norm": dict(norm="layernorm"),
    "norm_eps": dict(norm_eps=0.1),
    "norm_place": dict(norm_place="both"),
    "residual": dict(residual="parallel"),
    "embedding_scale": dict(embedding_scale=3.0),
    "residual_scale": dict(residual_scale=0.4),
    "logit_scale": dict(logit_scale=0.3),
    "attention_scale": dict(attention_scale=0.5),
    "position": dict(position="sinusoidal"),
    "ffn": dict(ffn="geglu"),
    "n_experts": MOE,
    "experts_per_token": MOE | dict(experts_per_token=3),
    "n_dense_layers": MOE | dict(n_dense_layers=1),
    "dense_ff": MOE | dict(n_dense_layers=2, dense_ff=96),
    "shared_ff": MOE | dict(shared_ff=32),
    "shared_gate": MOE | dict(shared_ff=32, shared_gate=True),
    "router": MOE | dict(router="sigmoid"),
    "router_bias": MOE | dict(router_bias=True),
    "choice_bias": MOE | dict(choice_bias=True, router="sigmoid"),
    "expert_groups": MOE | dict(expert_groups=3),
    "groups_used": MOE | dict(expert_groups=3, groups_used=2, choice_bias=True),
    "expert_bias": MOE | dict(expert_bias=True),
    "normalize_experts": MOE | dict(normalize_experts=False),
    "expert_scale": MOE | dict(expert_scale=2.5, shared_ff=32),
    "balance_loss": MOE | dict(balance_loss=0.3),
    "router_z_loss": MOE | dict(router_z_loss=0.3),
    "qk_norm": dict(qk_norm="whole"),
    "tie_embeddings": dict(tie_embeddings=False),
    "rope_theta": dict(rope_theta=100.0),
    "rope_scaling": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "local_rope": dict(layers="wf", sliding_window=5, local_rope={"rope_theta": 50.0}),
    "query_growth": dict(query_growth={"beta": 0.7, "length": 9}),
    "rotary_dim": dict(rotary_dim=8),
    "kv_rank": dict(kv_rank=24, rope_dim=8, value_dim=12),
    "q_rank": dict(kv_rank=24, q_rank=20, rope_dim=8, value_dim=16),
    "rope_dim": dict(kv_rank=24, rope_dim=4, value_dim=12, layers="fn"),
    "value_dim": dict(kv_rank=24, rope_dim=8, value_dim=8),
    "attention_sinks": dict(attention_sinks=True, layers="wf", sliding_window=5),
    "sliding_window": dict(sliding_window=5),
    "attention_softcap": dict(attention_softcap=1.5),
    "logit_softcap": dict(logit_softcap=2.0),
    "bias": dict(bias=True, norm="layernorm"),
    "qkv_bias": dict(qkv_bias=True),
    "output_bias": dict(output_bias=True),
    "ffn_bias": dict(ffn_bias=True),
    "norm_weight": dict(norm="layernorm", norm_weight=False),
    "norm_bias": dict(norm="layernorm", norm_bias=True),
    "head_bias": dict(head_bias=True, tie_embeddings=False),
    "dropout": dict(dropout=0.1),
    # What a value alone does not show.
    "after": dict(norm_place="after", qk_norm="after"),
    "shared": dict(residual="shared", ffn="gelu_erf", rotary_dim=8, bias=True),
    "clamped": MOE | dict(ffn="clamped_swiglu", expert_bias=True, router_bias=True, attention_sinks=True),
    "clamped, dense": dict(ffn="clamped_swiglu", attention_sinks=True, query_growth={"beta": 0.3, "length": 9}),
    "relu2, no norm": dict(ffn="relu2", norm="none"),
    "learned": dict(position="learned", ffn="gelu"),
    "qwen3": dict(qk_norm="head", n_kv_heads=1),
}  # fmt: skip


def opinionated(name):
    """Random weights; vectors too, which would start as ones and zeros and hide what is ignored."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY | MODELS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) / 4
            else:
                parameter *= 1.5
    return model


def test_models_cover_every_field():
    assert {field.name for field in dataclasses.fields(ModelConfig)} <= set(MODELS)
    for name, changes in MODELS.items():
        assert name not in vars(ModelConfig(**TINY)) or getattr(ModelConfig(**TINY), name) != changes[name]


@pytest.mark.parametrize("name", EXECUTORS)
def test_executor_refuses_what_it_never_heard_of(name):
    assert EXECUTORS[name](Tomorrow(**TINY)) and not EXECUTORS[name](Tomorrow(**TINY, twist=2.0))


@pytest.mark.parametrize("name", MODELS)
def test_served_model_is_the_definition(name):
    """Whatever serves a field, or falls back before it: prompts in chunks, and decoding, as `Transformer` says."""
    model = opinionated(name)
    prompt = [index * 7 % 50 for index in range(29)]
    llm = LLM(model, max_batch_tokens=16, max_batch=2, page_size=8)
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    output = llm.generate(prompt, params)
    tokens = [*prompt, *output.token_ids]
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
    expected = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
    assert (logprobs[28:-1].amax(-1) - expected[28:]).max() < 1e-4  # greedy, up to ties
    said = [entry.logprob for entry in (*output.prompt_logprobs, *output.logprobs)]
    torch.testing.assert_close(torch.tensor(said), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gpu_model_is_the_definition(name):
    """The executors of a GPU, by the kernels' references, likewise; latent attention keeps latents."""
    model = opinionated(name)
    prompt = [index * 7 % 50 for index in range(29)]
    llm = LLM(model, max_batch_tokens=16, max_batch=2, page_size=8)
    runner, latent = llm.engine.runner, gpu_model.PagedLatentAttention.is_supported(model.config)
    pages = runner.store.keys.shape[1]
    runner.store = PagedKVCache(model.config, pages, 8, torch.float32, torch.device("cpu"), latent)
    runner.store.layers, runner.head = None, serving_model.Head(model)
    runner.model = gpu_model.fused_model(model, gpu_model.batch_invariant_linear, latent=latent)
    assert latent == (model.config.kv_rank > 0)
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    output = llm.generate(prompt, params)
    tokens = [*prompt, *output.token_ids]
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
    said = [entry.logprob for entry in (*output.prompt_logprobs, *output.logprobs)]
    expected = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
    torch.testing.assert_close(torch.tensor(said), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", [name for name, changes in MODELS.items() if "n_experts" not in changes])
def test_served_int8_is_near(name):
    """Without experts: rounded logits of a router choose others, and then nothing is near."""
    model = opinionated(name)
    tokens = [index * 7 % 50 for index in range(29)]
    [said] = LLM(model, quantize="int8", page_size=16).score([tokens])
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
    expected = logprobs[torch.arange(28), tokens[1:]]
    assert (torch.tensor(said) - expected).square().mean().sqrt() < 0.1 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_balanced_block_is_the_block(name):
    model = opinionated(name)
    even = copy.deepcopy(model)
    even.blocks = torch.nn.ModuleList(outlier_smoothing.smoothed(block, model.config) for block in model.blocks)
    tokens = torch.arange(29)[None]
    with torch.no_grad():
        torch.testing.assert_close(even(tokens), model(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout"])
def test_trained_model_is_the_definition(name):
    model = opinionated(name).train()
    twin = copy.deepcopy(model)
    fused_block.install(twin)
    tokens = torch.arange(2 * 33).view(2, 33) * 7 % 50
    for each in (model, twin):
        each.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for (path, ours), theirs in zip(twin.named_parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda text: f"{path}: {text}")  # noqa: B023


def test_tensor_parallel_refuses_by_name():
    for name in ("attention_sinks", "kv_rank", "choice_bias", "expert_bias", "head_bias", "n_dense_layers"):
        with pytest.raises(ValueError, match=f"a model with {name}="):
            tensor_parallel.check(ModelConfig(**TINY | MODELS[name]), 2)
        tensor_parallel.check(ModelConfig(**TINY | MODELS[name]), 1)
