"""Claims about one model in several processes."""

import random
import re

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model, save_packed
from warploom.engine.formats.packed_weight import (
    Layout,
    PackedExperts,
    PackedWeight,
    expert_product,
    share_of,
)
from warploom.engine.formats.rounding import nearest
from warploom.engine.parallel.tensor_parallel import ShardSpec, shard_spec
from warploom.engine.serving import LLM, EngineError, SamplingParams
from warploom.engine.serving.calibrate import quantize
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.serving.execution.serving_model import NativeExperts
from warploom.engine.serving.scheme import Scheme

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

GREEDY = SamplingParams(6, temperature=0, ignore_eos=True)


@pytest.fixture
def team(tiny_model, tmp_path, monkeypatch):
    """A maker of the same model in one process and in two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads, made = torch.get_num_threads(), []

    def make(shape, **options):
        place = save_model(tiny_model(shape), tmp_path / shape)
        options = {name: place if name == "draft_model" else value for name, value in options.items()}
        made.append(LLM(place, tensor_parallel=2, **options))
        return LLM(place, kv_dtype=options.get("kv_dtype")), made[-1]

    yield make
    for llm in made:
        llm.close()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("llama", {"draft_model": True}),
        ("qwen3", {"kv_dtype": "int8"}),
        ("mixtral", {}),
        ("gpt2", {"max_batch_tokens": 9, "max_batch": 4}),
    ],
)
def test_two_processes_generate_the_tokens_of_one(team, shape, options):
    one, two = team(shape, **options)
    generator = random.Random(0)
    prompts = [[generator.randrange(97) for _ in range(length)] for length in (1, 9, 40, 17, 33)]
    params = [SamplingParams(16, i % 2 * 0.8, seed=i, prompt_logprobs=[None, 0][i // 4]) for i in range(5)]
    expected = one.generate(prompts, params)
    outputs = two.generate(prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    scores, alone = ([entry.logprob for entry in each[4].prompt_logprobs] for each in (outputs, expected))
    assert scores == pytest.approx(alone, abs=max(1e-4, rounding_noise(one, prompts[4], alone)))
    (worker,) = two.engine.runner.workers
    assert two.engine.alive and worker.poll() is None
    two.close()
    assert worker.poll() == 0, "it has gone, by itself"


def rounding_noise(llm, prompt, scores) -> float:
    """The most that rounding keys and values changes a log-probability; 0 for pages in the model's own format.

    Processes add partial products in an order of their own, so a key may differ in its last bit, and then a code that
    was near a half by one: a part of what rounding does to all of them. Without AVX-512 such a code is among these.
    """
    if llm.engine.runner.store.dtype != torch.int8:
        return 0.0
    return max(abs(a - b) for a, b in zip(scores, LLM(llm.plain_model).score(prompt)))


def test_tp_dead_process_ends_requests(team):
    """A process that dies ends what was computed with a sentence and nothing hangs."""
    _, llm = team("llama")
    going = llm.submit([1, 2, 3], SamplingParams(200, ignore_eos=True))
    llm.engine.step()
    llm.engine.runner.workers[0].kill()
    for generation in (going, llm.submit([1], SamplingParams())):
        with pytest.raises(EngineError, match="process 1 of 2 has ended with exit code -9; make the LLM anew"):
            generation.result()
    assert not llm.engine.alive
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_pages


def test_tp_unsupported_refused_before_start(tiny_model, tmp_path):
    """What cannot be spread is refused before any process starts."""
    with pytest.raises(ValueError, match="use save_model"):
        LLM(tiny_model(), tensor_parallel=2)
    place = save_model(tiny_model(), tmp_path / "model")
    with pytest.raises(ValueError, match="tp=3 does not divide n_heads=4"):
        LLM(place, tensor_parallel=3)


@pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("given", [True, False], ids=["quantize=", "packed file"])
@pytest.mark.parametrize(
    ("shape", "scheme", "count"),
    [
        ("llama", Scheme(), 9),
        ("llama", Scheme(4, 32, symmetric=False, rotate=False), 9),
        ("llama", Scheme(group=16), 9),
        ("mixtral", Scheme(4, 32, symmetric=False, rotate=False, keep={"ffn.router": 8}), 23),
    ],
    ids=str,
)
def test_two_processes_share_packed_weights(shape, scheme, count, given, tiny_model, tmp_path, monkeypatch):
    """Rows, and columns in whole groups: of 128 columns a half is whole groups of each of these schemes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    model = tiny_model(shape, d_model=128, d_ff=128, tie_embeddings=True)
    whole = save_model(model, tmp_path / "whole")
    quantize(model, scheme)
    place, options = save_packed(model, tmp_path / "packed"), {"kv_dtype": "float32"}
    if given:
        place, options = whole, {**options, "quantize": scheme}
    one, two = LLM(place, **options), LLM(place, tensor_parallel=2, **options)
    try:
        if not given:
            assert sum(map(int, re.findall(r"(\d+) matrices", two.packing or ""))) == count
        if shape == "mixtral":
            assert all(isinstance(block.ffn.product, NativeExperts) for block in two.model.blocks)
        text = [i * i % 97 for i in range(40)]
        alone, plain = torch.tensor(one.score(text)), torch.tensor(LLM(load_model(place, "cpu")[0]).score(text))
        change = (torch.tensor(two.score(text)) - alone).abs()  # a code of an activation near a half may be another
        assert change.max() < (alone - plain).abs().max()
        assert one.generate(text[:9], GREEDY).token_ids == two.generate(text[:9], GREEDY).token_ids
    finally:
        two.close()
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("bits", "group", "rotate"), [(8, 16, False), (4, 32, False), (4, 64, True)])
def test_packed_shares_are_the_weights(bits, group, rotate):
    """Row by row and group by group, of segments of two layouts; a cut within a group gives floats."""
    torch.manual_seed(0)
    layouts = ((n, Layout(bits, group, minimum, (), rotate)) for n, minimum in ((48, True), (16, False)))
    parts = [nearest(torch.randn(n, 256), layout).segments[0] for n, layout in layouts]
    weight = PackedWeight.joined(parts, 256)
    rows = ShardSpec(tp=0, parts=(32, 16, 16))
    for rank in range(2):
        for spec in (rows, ShardSpec(tp=1, parts=(256,))):
            share = share_of(weight, spec, rank, 2)
            assert isinstance(share, PackedWeight)
            assert torch.equal(share.dequantize(), spec.cut(weight.dequantize(), rank, 2))
    within = share_of(PackedWeight.joined(parts, 250), ShardSpec(tp=1, parts=(250,)), 1, 2)
    assert isinstance(within, torch.Tensor) and within.shape == (64, 125)


def test_packed_shares_have_finer_groups():
    """A share of 96 columns of 192 in groups of 64 is three groups of 32; of 200 the last group is filled up."""
    torch.manual_seed(0)
    for columns in (192, 200):
        weight = nearest(torch.randn(8, columns), Layout(4, 64, True, rotate=False))
        for first, last in ((0, 96), (96, columns)):
            share = weight.between(first, last)
            assert share is not None and share.segments[0].layout.group == 32
            assert torch.equal(share.dequantize(), weight.dequantize()[:, first:last])


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "apart"])
def test_packed_experts_in_shares_sum_to_the_whole(stacked):
    """Slices of every expert under tensor parallelism, whole experts under expert parallelism."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, d_model=64, d_ff=128, n_experts=4, experts_per_token=2, ffn="swiglu")
    packed = []
    for name, shape in (("w_gate_up", (4, 256, 64)), ("w_down", (4, 64, 128))):
        experts = PackedExperts(nearest(w, Layout(8, 64, rotate=False)) for w in torch.randn(shape) / 8)
        packed.append((shard_spec(config, f"ffn.{name}"), experts.stacked() if stacked else experts))
    x, logits = torch.randn(9, 64), torch.randn(9, 4)
    whole, _ = expert_product(x, logits, *(experts for _, experts in packed), 2)
    parts = torch.zeros_like(whole)
    for rank in range(2):
        shares = [share_of(experts, spec, rank, 2) for spec, experts in packed]
        for share, (spec, experts) in zip(shares, packed):
            assert torch.equal(share.dequantize(), spec.cut(experts.dequantize(), rank, 2))
        parts += expert_product(x, logits, *(share.stacked() if stacked else share for share in shares), 2)[0]
    torch.testing.assert_close(parts, whole)
    own = [[experts[2 * rank : 2 * rank + 2] for _, experts in packed] for rank in range(2)]
    assert all((mine.stack is not None) == stacked for each in own for mine in each)
    torch.testing.assert_close(
        sum(expert_product(x, logits, *each, 2, first=2 * rank)[0] for rank, each in enumerate(own)), whole
    )
