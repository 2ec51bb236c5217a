"""Hostile clients: whatever one of them sends, it gets an answer of its own and costs the others next to nothing."""

import json
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import serving

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")

JSON = {"content-type": "application/json"}


def many(element: bytes, size: int = 4_190_000) -> bytes:
    return b"[" + b",".join([element] * (size // (len(element) + 1))) + b"]"


def fields(count: int, value: str = "1") -> bytes:
    return ("{" + ",".join(f'"{i}":{value}' for i in range(count)) + "}").encode()


USER = b'{"role":"user","content":'
HOSTILE = {
    "empty rows": ("CompletionRequest", b'{"prompt":' + many(b"[]") + b"}"),
    "fractions": ("CompletionRequest", b'{"prompt":' + many(b"1.5") + b"}"),
    "empty texts to stop at": ("CompletionRequest", b'{"prompt":"x","stop":' + many(b"1") + b"}"),
    "wrong biases": ("CompletionRequest", b'{"prompt":"x","logit_bias":' + fields(300_000, '"x"') + b"}"),
    "unknown fields": ("CompletionRequest", fields(300_000)),
    "metadata": ("CompletionRequest", b'{"prompt":"x","metadata":' + fields(300_000) + b"}"),
    "empty messages": ("ChatRequest", b'{"messages":' + many(b"{}") + b"}"),
    "empty parts": ("ChatRequest", b'{"messages":[' + USER + many(b"{}") + b"}]}"),
    "empty calls": ("ChatRequest", b'{"messages":[' + USER + b'"x","tool_calls":' + many(b"{}") + b"}]}"),
    "empty tools": ("ChatRequest", b'{"messages":[' + USER + b'"x"}],"tools":' + many(b"{}") + b"}"),
    "negative ids": ("DetokenizeRequest", b'{"tokens":' + many(b"-1") + b"}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_parse_hostile_body_costs_like_its_json(name):
    """The first error decides: a wrong element costs nothing beyond reading it (it was 50 s and 6 GB)."""
    from warploom.engine.server.openai import requests
    from warploom.engine.server.openai.errors import APIError
    from warploom.engine.server.request_body import parse

    def cpu(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    kind, content = getattr(requests, HOSTILE[name][0]), HOSTILE[name][1]

    def refuse():
        with pytest.raises(APIError) as refused:
            parse(kind, content)
        assert refused.value.status == 400 and len(refused.value.message) < 300

    reading = cpu(lambda: json.loads(content))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cpu(refuse) < 4 * reading + 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150 << 10


def test_health_answers_while_large_bodies_are_judged():
    """Bodies over 64 kB are parsed in a worker thread."""
    content = HOSTILE["empty messages"][1]
    with serving() as server, httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(1) as other:
        offload, offloaded = server.bridge.offload, []

        async def watched(work, *arguments, **options):
            offloaded.append(work)
            return await offload(work, *arguments, **options)

        server.bridge.offload = watched
        asked = other.submit(httpx.post, f"{server.url}/v1/chat/completions", content=content, headers=JSON)
        while not asked.done():
            assert client.get("/health").status_code == 200
        assert asked.result().status_code == 400 and offloaded


def test_prompt_of_wrong_kind_is_told_what_a_prompt_is(client):
    for prompt in ([], {}, 5, [None], [{}]):
        refused = client.post("/v1/completions", json={"prompt": prompt})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        assert "a text, a list of token ids, or a list of either" in refused.json()["error"]["message"]
    mixed = client.post("/v1/completions", json={"prompt": [1, "x"]}).json()["error"]
    assert mixed["param"] == "prompt.1" and "integer" in mixed["message"]


def test_fair_pool_serves_clients_in_turn():
    from warploom.engine.serving.fair_pool import FairPool, PoolFull

    pool, order, go = FairPool(1, waiting=5), [], threading.Event()
    running = pool.submit("a", go.wait)
    while not running.running():
        time.sleep(0.001)
    first = [pool.submit("a", order.append, f"a{i}") for i in range(3)]
    last = pool.submit("b", order.append, "b")
    first[1].cancel()
    pool.submit("c", order.append, "c")
    with pytest.raises(PoolFull):
        pool.submit("d", order.append, "d")
    go.set()
    first[2].result(30)
    assert last.done() and order == ["a0", "b", "c", "a2"]
    pool.shutdown()
    with pytest.raises(PoolFull):
        pool.submit("a", order.append, "late")


# -- structured output ------------------------------------------------------------------------------------------------


def test_slow_grammars_delay_only_those_who_send_them(monkeypatch):
    """Two threads compile; who waits too long for them is told to come back, and everybody else is served."""
    from warploom.engine.serving import structured_output as grammar

    monkeypatch.setattr(grammar, "TIME_LIMIT", 0.2)
    build, done = grammar._build, threading.Event()
    monkeypatch.setattr(grammar, "_build", lambda *source: done.wait(60) and build(*source))
    with serving() as server, httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(6) as others:
        threads = threading.active_count()
        bodies = [{"prompt": "x", "max_tokens": 9, "regex": f"slow{i}"} for i in range(5)]
        asked = [others.submit(client.post, "/v1/completions", json=body) for body in bodies]
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        answers = [each.result() for each in asked]
        assert sorted(answer.status_code for answer in answers) == [400, 400, 503, 503, 503]
        for answer in answers:
            assert "retry-after" in answer.headers if answer.status_code == 503 else "simplify it" in answer.text
        assert threading.active_count() <= threads + 5 + 2, "a thread a client here, and the two that compile"
        done.set()
        server.wait(lambda: client.post("/v1/completions", json=bodies[0]).status_code == 200)
        server.assert_nothing_left()


def test_grammar_beyond_its_limits_is_the_clients_mistake(client, server):
    huge = [f"c{i}" for i in range(100_000)]
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1500)}}
    for body in ({"choice": huge}, {"guided_json": wide}, {"guided_json": wide, "stream": True}):
        refused = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 50, **body})
        text = refused.text.removeprefix("data: ")
        assert json.loads(text.split("\n\n")[0])["error"]["type"] == "invalid_request_error"
        assert refused.status_code == 400 or body.get("stream")
    chosen = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 50, "choice": huge[:2500]})
    assert chosen.json()["choices"][0]["text"] in huge
    server.assert_nothing_left()


def test_structured_output_in_every_spelling(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    wanted = {
        '{"a":1}': [
            {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
            {"guided_json": schema},
            {"guided_json": json.dumps(schema)},
            {"structured_outputs": {"json": schema}},
        ],
        "ab": [
            {"regex": "ab"},
            {"guided_regex": "ab"},
            {"choice": ["ab"]},
            {"guided_choice": ["ab"]},
            {"guided_grammar": 'start: "a" "b"'},
            {"structured_outputs": {"grammar": 'root ::= "ab"'}},
            {"structured_outputs": {"regex": "ab"}},
            {"structured_outputs": {"choice": ["ab"]}},
        ],
    }
    for text, spellings in wanted.items():
        for body in spellings:
            answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 50, **body})
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"].replace(" ", "") == text, body
    both = client.post("/v1/completions", json={"prompt": "x", "regex": "a", "guided_choice": ["b"]})
    assert both.status_code == 400 and "regex, guided_choice" in both.json()["error"]["message"]


def test_vocabulary_is_ready_when_the_server_is(server):
    assert server.bridge.llm.grammars._ready is not None


def test_preparation_keeps_the_requests_time_limit():
    """Tokenizing counts too: a neighbor of slow texts waited 198 s in spite of the limit."""
    with serving(request_timeout=0.3) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        go, encode = threading.Event(), server.bridge.llm.encode
        server.bridge.llm.encode = lambda prompt: go.wait(60) and encode(prompt)
        late = client.post("/v1/completions", json={"prompt": "x"})
        assert late.status_code == 504
        go.set()
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        server.assert_nothing_left()
