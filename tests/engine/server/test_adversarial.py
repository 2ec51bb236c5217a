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
    from warploom.engine.server import requests
    from warploom.engine.server.errors import APIError
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
    from warploom.engine.server.fair_pool import FairPool, PoolFull

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
