"""Claims about SamplingParams."""

import math

import pytest

from warploom.engine.serving.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 2),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-39),
        ("presence_penalty", math.inf),
        ("frequency_penalty", 1000),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("n", 0),
        ("n", 10**6),
        ("seed", 2**63),
        ("logprobs", -1),
        ("prompt_logprobs", 10**4),
        ("stop", ("",)),
        ("stop", 3),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 3),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]),
        ("choice", ()),
    ],
)
def test_params_impossible_refused_by_field(field, value):
    """An impossible value is refused by field and value."""
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 9.9e-5])
def test_params_tiny_temperature_is_greedy(temperature):
    assert SamplingParams(temperature=temperature).temperature == 0
    assert not SamplingParams(temperature=1e-4).greedy


def test_two_grammars_are_refused():
    with pytest.raises(ValueError, match="regex and choice"):
        SamplingParams(regex="a", choice=("b",))


def test_lists_and_single_strings_are_taken_for_tuples():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"], stop_token_ids=[1]).stop_token_ids == (1,)
