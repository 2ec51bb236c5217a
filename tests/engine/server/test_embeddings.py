"""Embeddings and scores through the openai client, against the model's own hidden states."""

import numpy as np
import pytest
import torch

from warploom.engine.serving import LLM

from .conftest import make_model, make_tokenizer, serving

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")
openai = pytest.importorskip("openai", reason="needs the openai client")

TEXTS = ["a loom", "weaves", "é😀", "x" * 200]


def states(text):
    with torch.no_grad():
        return make_model().hidden(torch.tensor([list(text.encode())]))[0].double().numpy()


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def api(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings_are_pooled_hidden_states(api, server, pooling, encoding):
    answer = api.embeddings.create(model="tiny", input=TEXTS, extra_body={"pooling": pooling}, **encoding)
    assert answer.usage.prompt_tokens == sum(len(text.encode()) for text in TEXTS) and answer.pooling == pooling
    for text, found in zip(TEXTS, answer.data):
        vector = found.embedding
        if isinstance(vector, str):
            import base64

            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        wanted = states(text).mean(0) if pooling == "mean" else states(text)[-1]
        np.testing.assert_allclose(vector, unit(wanted), atol=2e-6)
    ids = api.embeddings.create(model="tiny", input=[list(text.encode()) for text in TEXTS], dimensions=32)
    if pooling == "mean":
        assert [each.embedding for each in ids.data] == [
            each.embedding for each in api.embeddings.create(model="tiny", input=TEXTS).data
        ]
    server.assert_nothing_left()


def test_embedding_has_the_same_bits_in_any_chunks():
    vectors = []
    for step in (8, 512):
        make = lambda step=step: LLM(make_model(), make_tokenizer(), max_batch=8, max_batch_tokens=step)  # noqa: E731
        with serving(make) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as api:
            vectors.append([each.embedding for each in api.embeddings.create(model="tiny", input=TEXTS).data])
    assert vectors[0] == vectors[1]


def test_many_inputs_are_embedded_in_waves(api, server):
    texts = [f"text {number % 7}" for number in range(150)]
    vectors = [each.embedding for each in api.embeddings.create(model="tiny", input=texts).data]
    assert vectors == [vectors[number % 7] for number in range(150)]
    server.assert_nothing_left()


def test_scores_are_cosines(client):
    body = {"text_1": "a loom", "text_2": ["weaves", "a loom", "sings"]}
    answer = client.post("/v1/score", json=body).json()
    left = unit(states("a loom").mean(0))
    wanted = [left @ unit(states(text).mean(0)) for text in body["text_2"]]
    assert [each["score"] for each in answer["data"]] == pytest.approx(wanted, abs=1e-6)
    assert [each["index"] for each in answer["data"]] == [0, 1, 2] and answer["pooling"] == "mean"
    pairs = client.post("/v1/score", json={"text_1": ["a", "b"], "text_2": ["c", "d"], "pooling": "last"}).json()
    wanted = [unit(states(a)[-1]) @ unit(states(b)[-1]) for a, b in ("ac", "bd")]
    assert [each["score"] for each in pairs["data"]] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("embeddings", {"input": "x", "dimensions": 16}, "dimensions is 16; this model's embeddings have 32"),
        ("embeddings", {"input": ""}, "the prompt is empty"),
        ("embeddings", {"input": [1, 999]}, "999"),
        ("embeddings", {"input": ["x"] * 2049}, "at most 2048"),
        ("embeddings", {"input": "x" * 400}, "too many for a context of 320"),
        ("embeddings", {"input": "x", "pooling": "max"}, "pooling"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1 has 2 texts and text_2 3"),
        ("score", {"text_1": "a"}, "text_2"),
    ],
)
def test_what_cannot_be_embedded_is_said(client, path, body, says):
    refused = client.post(f"/v1/{path}", json=body)
    assert refused.status_code == 400 and says in refused.json()["error"]["message"], refused.text


def test_long_inputs_can_be_truncated(api):
    cut = api.embeddings.create(model="tiny", input="y" * 1000 + "x" * 200, extra_body={"truncate_prompt_tokens": 200})
    np.testing.assert_allclose(cut.data[0].embedding, unit(states("x" * 200).mean(0)), atol=2e-6)


def test_langchain_embeds(server):
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    embed = langchain.OpenAIEmbeddings(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(embed.embed_query("a loom"), unit(states("a loom").mean(0)), atol=2e-6)
