"""Log-probabilities that requests ask for, against the model's own logits in float32: of prompts, and to choose by."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from .conftest import make_model

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("httpx", reason="these tests need httpx")

PROMPT = "The shuttle carries the weft through the shed, there and back."


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.inference_mode()
def logprobs_of(model, tokens):
    """Of every token that may come after each of these."""
    return torch.log_softmax(model(torch.tensor([tokens])).float(), -1)[0]


def complete(client, **body):
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_scores(told, model, tokens, top):
    """What is told of a prompt is what the model says."""
    wanted = logprobs_of(model, tokens)
    assert told[0] is None and len(told) == len(tokens)
    for place, entry in enumerate(told[1:]):
        row, own = wanted[place], str(tokens[place + 1])
        best = row.topk(top).indices.tolist()
        assert entry.keys() == {own, *map(str, best)} and next(iter(entry)) == own
        for token, each in entry.items():
            assert each["logprob"] == pytest.approx(row[int(token)].item(), abs=1e-4)
            assert each["rank"] == 1 + int((row > row[int(token)]).sum())
            assert each["decoded_token"].isprintable() or len(each["decoded_token"]) == 1


def test_prompt_is_scored_exactly_though_cached_and_in_company(client, model):
    """Cached pages have no logits: such a request computes them anew, and its numbers are the same beside others."""
    tokens = list(PROMPT.encode())
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 3, "seed": 1}
    alone = complete(client, **body)
    assert_scores(alone["choices"][0]["prompt_logprobs"], model, tokens, 3)
    assert complete(client, prompt=PROMPT, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(complete, client, prompt=PROMPT[n:], max_tokens=40) for n in range(8)]
        again = [pool.submit(complete, client, **body) for _ in range(4)]
        answers = [each.result() for each in again]
        assert all(each.result() for each in others)
    assert all(answer["choices"] == alone["choices"] for answer in answers)
    assert all(answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 for answer in answers)


def test_prompt_scores_stand_beside_all_that_is_asked(client, model):
    """Two prompts, two continuations each; `echo` with its own number of alternatives; nothing generated."""
    prompts = [list(b"one prompt"), list(b"and another")]
    body = {"prompt": prompts, "n": 2, "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 2}
    choices = complete(client, **body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        tokens = prompts[choice["index"] // 2]
        assert_scores(choice["prompt_logprobs"], model, tokens, 2)
        wanted = logprobs_of(model, tokens)[range(len(tokens) - 1), tokens[1:]]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])


def test_conversation_is_scored(client, model):
    messages = [{"role": "user", "content": "hi"}]
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    body = {"messages": messages, "max_tokens": 2, "prompt_logprobs": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert_scores(answer["prompt_logprobs"], model, tokens, 0)
    refused = client.post("/v1/chat/completions", json={**body, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


def test_scores_of_a_prompt_count_once_a_continuation(client):
    """They are told with each: 128 times 300 tokens with 100 alternatives were counted once, and took gigabytes."""
    body = {"prompt": [65] * 300, "max_tokens": 0, "n": 128}
    for asked in ({"prompt_logprobs": 100}, {"echo": True, "logprobs": 100}):
        refused = client.post("/v1/completions", json={**body, **asked})
        assert refused.status_code == 400 and "log-probabilities" in refused.json()["error"]["message"]


def test_best_of_answers_the_likeliest_continuations(client, model):
    """The n of the highest mean log-probability, best first, of those that the same seed gives; usage counts all."""
    body = {"prompt": "A loom", "max_tokens": 12, "seed": 7, "stop": "e", "temperature": 1.5}
    every = complete(client, **body, n=6, logprobs=0)

    def mean(choice):
        """By the model itself, over the tokens generated."""
        tokens = [ord(name) if len(name) == 1 else int(name[-2:], 16) for name in choice["logprobs"]["tokens"]]
        rows = logprobs_of(model, [*b"A loom", *tokens])[5:-1]
        return rows[range(len(tokens)), tokens].mean().item()

    ranked = [choice["text"] for choice in sorted(every["choices"], key=mean, reverse=True)]
    assert ranked[:2] != [choice["text"] for choice in every["choices"][:2]]  # else choosing would show nothing
    for shown in ({}, {"logprobs": 0}, {"echo": True}):
        best = complete(client, **body, n=2, best_of=6, **shown)
        start = "A loom" if "echo" in shown else ""
        assert [choice["text"] for choice in best["choices"]] == [start + text for text in ranked[:2]]
        assert [choice["index"] for choice in best["choices"]] == [0, 1]
        assert [choice["logprobs"] is not None for choice in best["choices"]] == ["logprobs" in shown] * 2
        assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]


def test_best_of_that_cannot_be_is_refused(client):
    for wrong in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"best_of": 0}):
        refused = client.post("/v1/completions", json={"prompt": "x", **wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "best_of", wrong
    asked = {"messages": [{"role": "user", "content": "x"}], "best_of": 2}
    assert client.post("/v1/chat/completions", json=asked).json()["error"]["param"] == "best_of"
