"""Claims about structured output."""

import json
import re

import pytest

from warploom.engine.serving import LLM, EngineError, SamplingParams, grammar

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def llm(tiny_model, tokenizer):
    return LLM(tiny_model(vocab_size=tokenizer.vocab_size + 5), tokenizer)


def test_text_matches_the_regular_expression_whatever_the_model_would_say(llm):
    params = [SamplingParams(regex=r"[a-c]{3}-\d{2,4}", seed=seed, temperature=2.0) for seed in range(8)]
    outputs = llm.generate(["x"] * 8, params)
    assert all(re.fullmatch(r"[a-c]{3}-\d{2,4}", output.text) for output in outputs)
    assert len({output.text for output in outputs}) > 1
    assert all(output.finish_reason == "stop" for output in outputs)


def test_text_is_one_of_the_choices(llm):
    choices = ("yes", "no", 'a "quoted" one')
    outputs = llm.generate(
        ["x"] * 12, [SamplingParams(choice=choices, seed=seed, temperature=3.0) for seed in range(12)]
    )
    assert {output.text for output in outputs} <= set(choices) and len({output.text for output in outputs}) > 1


def test_text_is_json_that_satisfies_the_schema_beside_free_neighbours(llm):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    strict = SamplingParams(json_schema=schema, max_tokens=60, seed=1, n=3)
    free = SamplingParams(max_tokens=9, seed=2)
    alone = llm.generate("b", free)
    output, neighbour = llm.generate(["a", "b"], [strict, free])
    assert neighbour.token_ids == alone.token_ids
    for choice in output.choices:
        value = json.loads(choice.text)
        assert set(value) == {"name", "age"} and value["name"] in ("Ann", "Bo") and 0 <= value["age"] <= 99


@pytest.mark.parametrize(
    "params",
    [{"regex": "(unclosed"}, {"json_schema": "not json"}, {"json_schema": {"type": "no such type"}}],
)
def test_what_cannot_be_compiled_is_refused_and_the_engine_goes_on(llm, params):
    with pytest.raises(ValueError, match=f"{next(iter(params))} cannot be compiled"):
        llm.generate("x", SamplingParams(**params))
    assert llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True)).finish_reason == "length"


def test_without_a_tokenizer_a_grammar_is_refused(model):
    with pytest.raises(ValueError, match="need a tokenizer"):
        LLM(model).generate([1], SamplingParams(regex="a"))


def test_a_grammar_that_outgrows_its_limits_ends_its_own_request_and_nobody_elses(llm):
    strict, free = SamplingParams(choice=tuple(f"c{i}" for i in range(3000))), SamplingParams(seed=2, max_tokens=9)
    alone = llm.generate("b", free)
    failing, going = llm.submit("a", strict), llm.submit("b", free)
    with pytest.raises(EngineError, match="max is 2000"):
        failing.result()
    assert going.result().token_ids == alone.token_ids and llm.engine.failures == 0
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_pages


def test_a_grammar_that_takes_too_long_to_compile_is_refused(llm, monkeypatch):
    monkeypatch.setattr(grammar, "TIME_LIMIT", 0.0)
    many = {f"p{i}": {"type": "string", "pattern": "^(a|b){1,500}$"} for i in range(300)}
    with pytest.raises(ValueError, match="json_schema takes more than 0 seconds"):
        llm.generate("x", SamplingParams(json_schema={"type": "object", "properties": many}))
