"""Adapters in serving: many in one batch, each as if merged, none aware of the others."""

import json

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.errors import InputError
from warploom.engine.formats.adapters import AdapterConfig, factor_names, low_rank_weights
from warploom.engine.formats.families import architecture_of
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model, write_adapter
from warploom.engine.model import Transformer
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution import serving_model

SHAPE = dict(vocab_size=97, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96)
SHAPES = {
    "llama": {}, "gpt2": {"norm": "layernorm", "position": "learned", "ffn": "gelu", "bias": True, "n_kv_heads": 4},
    "neox": {"norm": "layernorm", "residual": "parallel", "ffn": "gelu_erf", "bias": True, "n_kv_heads": 4},
    "experts": {"n_experts": 4, "d_ff": 32}, "shared": {"n_experts": 4, "d_ff": 32, "shared_ff": 48},
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=0)
PROMPTS = [[3 * i + j for j in range(5 + i)] for i in range(6)]


def write(folder, base, config, rank, seed, targets=()):
    """An adapter with random factors."""
    kind, generator = architecture_of(config), torch.Generator().manual_seed(seed)
    tensors = {}
    for weight in low_rank_weights(config, kind):
        for layer, outputs in zip(weight.layers, weight.sizes):
            if targets and not layer.endswith(targets):
                continue
            a, b = factor_names(layer)
            tensors[a] = torch.randn(rank, weight.shape[1], generator=generator) / 8
            tensors[b] = torch.randn(outputs, rank, generator=generator) / 2
    adapter = AdapterConfig(str(base), rank, 2 * rank, targets=targets)
    return write_adapter(adapter, config, kind, tensors.items(), folder)


@pytest.fixture(params=SHAPES)
def model(request, tmp_path):
    """A base of a shape and two adapters of it, of other ranks and other layers."""
    config = ModelConfig(**SHAPE | SHAPES[request.param])
    torch.manual_seed(0)
    save_model(Transformer(config), tmp_path / "base")
    write(tmp_path / "red", tmp_path / "base", config, 4, 1)
    write(
        tmp_path / "blue",
        tmp_path / "base",
        config,
        3,
        2,
        ("q_proj", "v_proj", "c_attn", "attention.qkv", "query_key_value"),
    )
    return tmp_path


@pytest.fixture
def llm(model):
    opened = LLM(model / "base", device="cpu", adapters={name: model / name for name in ("red", "blue")})
    yield opened
    opened.close()


def told(output):
    return output.token_ids, [entry.logprob for entry in output.logprobs]


def test_adapted_rows_answer_as_merged_models(model, llm):
    """All three kinds of rows in one batch; a directory of an adapter is the merged model."""
    names = [None, "red", "blue"] * 2
    outputs = llm.generate(PROMPTS, GREEDY, adapter=names)
    answers = set()
    for name in (None, "red", "blue"):
        merged = LLM(model / (name or "base"), device="cpu")
        mine = [i for i, other in enumerate(names) if other == name]
        for i, wanted in zip(mine, merged.generate([PROMPTS[i] for i in mine], GREEDY)):
            assert outputs[i].token_ids == wanted.token_ids
            assert told(outputs[i])[1] == pytest.approx(told(wanted)[1], abs=1e-4)
        answers.add(tuple(told(merged.generate(PROMPTS[0], GREEDY))[1]))
        merged.close()
    assert len(answers) == 3, "or the adapters changed nothing"


def test_base_rows_keep_their_bits_beside_adapters(model, llm):
    alone = LLM(model / "base", device="cpu")
    wanted = [told(alone.generate(prompt, GREEDY)) for prompt in PROMPTS]
    alone.close()
    together = llm.generate(PROMPTS * 3, GREEDY, adapter=[None] * 6 + ["red", "blue"] * 6)
    assert [told(output) for output in together[:6]] == wanted


def test_adapter_number_that_is_not_there_raises(llm):
    if not isinstance(llm.model, serving_model.NativeTransformer):
        pytest.skip("numbers of adapters are the C++ decoder's")
    llm.engine.runner.adapters.numbers["red"] = 2
    with pytest.raises(Exception, match="adapter 2 is out of range: there are 2"):
        llm.generate(PROMPTS[0], GREEDY, adapter="red")


@pytest.mark.parametrize("native", [True, False])
def test_adapted_row_does_not_depend_on_company(model, monkeypatch, native):
    monkeypatch.setattr(serving_model, "HAS_NATIVE", serving_model.HAS_NATIVE and native)
    llm = LLM(model / "base", device="cpu", adapters={name: model / name for name in ("red", "blue")})
    if llm.config.n_experts and not native:
        pytest.skip("without the extension the rows of experts depend on their company anyway")
    alone = [told(llm.generate(prompt, GREEDY, adapter="red")) for prompt in PROMPTS]
    together = llm.generate(PROMPTS * 3, GREEDY, adapter=["red"] * 6 + ["blue"] * 6 + [None] * 6)
    assert [told(output) for output in together[:6]] == alone


def test_prefix_cache_does_not_mix_adapters(llm):
    """One prompt over full pages, first by one adapter: the others find none of its keys and values."""
    prompt = list(range(64))
    fresh = {}
    for name in ("red", "blue", None):
        outputs = [llm.generate(prompt, GREEDY, adapter=name) for _ in range(2)]
        assert outputs[0].metrics.cached_tokens == 0 and outputs[1].metrics.cached_tokens >= 48
        assert told(outputs[0]) == told(outputs[1])
        fresh[name] = tuple(told(outputs[0])[1])
    assert len(set(fresh.values())) == 3


def test_scores_and_int8_with_adapters(model):
    llm = LLM(model / "base", device="cpu", quantize="int8", adapters={"red": model / "red"})
    merged, _ = load_model(model / "red", "cpu")
    tokens = torch.tensor(PROMPTS[-1])
    with torch.no_grad():
        wanted = torch.log_softmax(merged(tokens[None])[0], -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    base, adapted = (torch.tensor(llm.score(tokens.tolist(), adapter=name)) for name in (None, "red"))
    assert (adapted - wanted).abs().mean() < 0.2 * (base - wanted).abs().mean()
    llm.close()


def test_adapter_that_cannot_be_served_is_refused(model, llm, tmp_path):
    with pytest.raises(InputError, match="adapter 'green' is not loaded; loaded: red, blue"):
        llm.generate(PROMPTS[0], GREEDY, adapter="green")
    with pytest.raises(InputError, match="adapter has 2 entries for 6 prompts"):
        llm.generate(PROMPTS, GREEDY, adapter=["red", None])
    with pytest.raises(InputError, match=r"adapter 'red': .* is no adapter: it has no adapter_config.json"):
        LLM(model / "base", adapters={"red": model / "base"})
    other = ModelConfig(**SHAPE | {"d_model": 32})
    save_model(Transformer(other), tmp_path / "other")
    with pytest.raises(InputError, match=r"adapter 'red': .*is of another model|which its model"):
        LLM(tmp_path / "other", adapters={"red": model / "red"})
    with pytest.raises(InputError, match="tensor_parallel must be 1 with adapters"):
        LLM(model / "base", adapters={"red": model / "red"}, tensor_parallel=2)
    assert json.loads((model / "red" / "adapter_config.json").read_text())["r"] == 4
