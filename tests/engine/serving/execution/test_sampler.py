"""Claims about how tokens are chosen: against the exact distribution, computed in float64 from the definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.engine.serving.execution import sampler as sampling
from warploom.engine.serving.execution.sampler import Logprobs, RowSettings, penalize
from warploom.engine.serving.sampling_params import SamplingParams

V, DRAWS = 24, 100_000


def exact_distribution(logits, params: SamplingParams, prompt=(), output=()):
    """Penalties, bias, temperature, top-k, top-p and min-p by their definitions, one token at a time."""
    x = logits.double().tolist()
    for token in range(V):
        if token in prompt or token in output:
            factor = params.repetition_penalty
            x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        x[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty * (token in output)
        x[token] += (params.logit_bias or {}).get(token, 0.0)
    weights = [math.exp((value - max(x)) / params.temperature) for value in x]
    order = sorted(range(V), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if mass >= params.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p * max(weights)]
    total = sum(weights[token] for token in kept)
    return torch.tensor([weights[token] / total if token in kept else 0.0 for token in range(V)], dtype=torch.float64)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"temperature": 1.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.2},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.2, "frequency_penalty": -0.4},
        {"logit_bias": {3: 2.5, 7: -100.0}},
        {"top_k": 9, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.1, "temperature": 1.4},
        {"top_k": 6, "min_p": 0.2, "frequency_penalty": 0.5},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "logit_bias": {3: 1}},
    ],
    ids=lambda changes: ", ".join(changes),
)  # fmt: skip
@pytest.mark.parametrize("by", ["native", "eager"])
def test_draws_follow_the_exact_distribution(changes, by, monkeypatch):
    if by == "eager":
        monkeypatch.setattr(sampling, "HAS_NATIVE", False)
    params = SamplingParams(**changes)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    prompt, output = torch.tensor([1, 2, 2]), torch.tensor([2, 5, 5, 9])
    settings = RowSettings(1, torch.device("cpu"))
    settings.admit(0, params, seed=11)
    past = torch.cat([torch.tensor([[0] * 7, [*prompt, *output]]), torch.full((2, 2), 3)], 1)
    changed = penalize(logits[None], [params], past, [1], [3], [7])[0] if params.penalized else logits.clone()
    for tokens, values in settings.bias.values():
        changed[tokens] += values
    index, positions = torch.zeros(DRAWS, dtype=torch.int64), torch.arange(DRAWS)
    drawn = settings.choose(changed.expand(DRAWS, V), [0], index, positions)
    expected = exact_distribution(logits, params, prompt.tolist(), output.tolist()) * DRAWS
    counts = torch.bincount(drawn, minlength=V).double()
    assert counts[expected == 0].sum() == 0, "a token was drawn that is not among the kept"
    likely = expected >= 5
    chi_squared = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
    freedom = int(likely.sum()) - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom), "about one in a million by chance"


def test_sampler_rows_keep_their_settings():
    """Different rows of a batch keep their own settings."""
    rows = [SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(temperature=5.0), SamplingParams()]
    settings = RowSettings(4, torch.device("cpu"))
    for row, params in enumerate(rows):
        settings.admit(row, params, seed=row)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    index, positions = torch.arange(4), torch.full((4,), 9)
    together = settings.choose(logits, [0, 1, 2, 3], index, positions)
    assert together[0] == logits[0].argmax() and together[1] == logits[1].argmax()
    for row in range(4):
        assert settings.choose(logits[row : row + 1], [row], index[row : row + 1], positions[:1]) == together[row]
    assert not torch.equal(settings.choose(logits, [0, 1, 2, 3], index, positions + 1), together)


@settings(max_examples=60)
@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40), st.integers(0, 5))
def test_logprobs_are_models_own_best_first(values, top):
    """Reported logprobs are the models own and best first."""
    logits = torch.tensor([values])
    (entry,) = Logprobs(logits, torch.tensor([1]), top).read()
    expected = torch.log_softmax(logits.double(), -1)[0]
    assert entry.logprob == pytest.approx(expected[1].item(), abs=1e-5)
    assert [value for _, value in entry.top] == pytest.approx(
        expected.sort(descending=True).values[:top].tolist(), abs=1e-5
    )
