"""Hostile clients: whatever one of them sends, it gets an answer of its own and costs the others next to nothing."""

import functools
import json
import resource
import select
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from .conftest import HeldLLM, serving

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
    assert any(cpu(refuse) < 4 * reading + 0.1 for _ in range(3))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150 << 10


def longest_pause(work):
    """CPU seconds that went by while a thread beside the work could not run, at most."""
    pauses, done = [0.0], threading.Event()

    def tick():
        last = time.process_time()
        while not done.is_set():
            time.sleep(0.0005)
            now = time.process_time()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(pauses)


@functools.cache
def pause_of_reading():
    """The same of reading 4 MB of lists in one go."""
    from pydantic_core import from_json

    return longest_pause(lambda: from_json(b'{"prompt":' + many(b"[]") + b"}"))


@pytest.mark.parametrize("element", [b"[]", b"{}", b"[1]", b"1", b'""'])
def test_parse_large_body_lets_other_threads_run(element):
    """Parsing holds Python's lock: 4 MB of lists kept the event loop from running for as long as they took to read."""
    from warploom.engine.server.openai.errors import APIError
    from warploom.engine.server.openai.requests import CompletionRequest
    from warploom.engine.server.request_body import parse

    content = b'{"prompt":' + many(element) + b"}"

    def refuse():
        with pytest.raises(APIError, match=r"the body holds .* at most"):
            parse(CompletionRequest, content)

    refuse()
    assert min(longest_pause(refuse) for _ in range(3)) < pause_of_reading() / 5


def test_large_text_may_hold_any_signs():
    """Only what stands outside of strings counts."""
    from warploom.engine.server.openai.requests import CompletionRequest
    from warploom.engine.server.request_body import parse

    for text in ('[{"a", \\" \\\\', "[,", '\\"', "\\\\", '"'):
        prompt = text * (1 << 20)
        assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode())[0].prompt == prompt


def test_event_loop_turns_between_the_long_calls_of_large_bodies(monkeypatch):
    """Each keeps Python's lock for some 50 ms: /health waits for one of them at each turn, whatever number has come."""
    from warploom.engine.server import request_body
    from warploom.engine.server.openai.requests import CompletionRequest

    content, log = json.dumps({"prompt": [[5] * 60] * 600}).encode(), []

    def logged(call):
        def long_call(*arguments):
            log.append("begin")
            time.sleep(0.01)  # without the lock: what would run beside it does
            log.append("end")
            return call(*arguments)

        return long_call

    monkeypatch.setattr(request_body, "from_json", logged(request_body.from_json))
    monkeypatch.setattr(CompletionRequest, "model_validate", logged(CompletionRequest.model_validate))
    with serving() as server, ThreadPoolExecutor(4) as clients:
        loop, turning = server.bridge._loop, True

        def turn():
            log.append("turn")
            if turning:
                loop.call_soon(turn)

        loop.call_soon_threadsafe(turn)
        asked = [clients.submit(httpx.post, f"{server.url}/v1/completions", content=content, headers=JSON)
                 for _ in range(8)]  # fmt: skip
        assert {each.result().status_code for each in asked} == {400}
        turning = False
    calls = [number for number, what in enumerate(log) if what == "begin"]
    ends = [number for number, what in enumerate(log) if what == "end"]
    assert len(calls) == 16 and all("turn" in log[end:begin] for end, begin in zip(ends, calls[1:]))


def test_prompt_of_wrong_kind_is_told_what_a_prompt_is(client):
    for prompt in ([], {}, 5, [None], [{}]):
        refused = client.post("/v1/completions", json={"prompt": prompt})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        assert "a text, a list of token ids, or a list of either" in refused.json()["error"]["message"]
    mixed = client.post("/v1/completions", json={"prompt": [1, "x"]}).json()["error"]
    assert mixed["param"] == "prompt.1" and "integer" in mixed["message"]


def test_bodies_that_cannot_be_read_are_told_why(client):
    packed = client.post("/v1/completions", content=b"x", headers={**JSON, "content-encoding": "gzip"})
    assert packed.status_code == 415 and "compressed" in packed.json()["error"]["message"]
    for content, why in ((b"{'a': 1}", "key must be a string"), (b"[" * 300, "recursion limit")):
        refused = client.post("/v1/completions", content=content, headers=JSON)
        assert refused.status_code == 400 and why in refused.json()["error"]["message"]
    ahead = client.post("/v1/completions", json={"prompt": "x", "regex": "(?=a)b"})
    assert ahead.status_code == 400 and "look-around" in ahead.json()["error"]["message"]


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


def test_fair_pool_keeps_no_cancelled_call():
    """An idle thread held the last request for as long as no other came, if its client had left before its turn."""
    from warploom.engine.serving.fair_pool import FairPool

    class Request:
        pass

    pool, go, request = FairPool(1), threading.Event(), Request()
    running, kept = pool.submit("a", go.wait), weakref.ref(request)
    pool.submit("a", print, request).cancel()
    del request
    go.set()
    running.result(30)
    end = time.monotonic() + 60
    while kept() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert kept() is None
    pool.shutdown()


def test_large_answers_are_written_beside_the_loop(monkeypatch):
    """128 continuations with their alternatives kept the event loop for five seconds."""
    from warploom.engine.server.openai.responses import ChatWriter, CompletionWriter

    threads = []

    def note(kind, name):
        make = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *rest: threads.append(threading.current_thread().name) or make(*rest))

    for kind, name in ((CompletionWriter, "whole"), (CompletionWriter, "chunks"), (ChatWriter, "whole")):
        note(kind, name)
    hi = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}
    echoed = {"prompt": ["x" * 200] * 9, "max_tokens": 1, "echo": True, "logprobs": 9}
    cases = [
        ("completions", echoed, True),
        (
            "completions",
            {"prompt": ["x" * 200] * 9, "max_tokens": 1, "echo": True, "logprobs": 9, "stream": True},
            True,
        ),
        ("completions", {"prompt": ["x" * 200] * 9, "max_tokens": 1}, False),
        ("chat/completions", {**hi, "n": 16, "max_tokens": 40, "ignore_eos": True}, True),
        ("chat/completions", {**hi, "max_tokens": 1}, False),
    ]
    with serving() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body, beside in cases:
            threads.clear()
            assert client.post(f"/v1/{path}", json=body).status_code == 200
            assert any(name.startswith("warploom-text") for name in threads) == beside, (path, body)
        server.assert_nothing_left()


def test_long_lists_are_written_in_slices(monkeypatch):
    from warploom.engine.server.openai import responses

    value = {"tokens": [*range(40_000)], "texts": ["é", "]"] * 20_000, "none": [], "rows": [[1.5, None], []]}
    encode, sizes = responses._encode, []
    monkeypatch.setattr(responses, "_encode", lambda part: sizes.append(len(encode(part))) or encode(part))
    for levels in (1, 2, 5):
        assert json.loads(responses.to_json_in_parts(value, levels)) == value
    assert max(sizes) < 200_000


def test_more_scores_than_an_answer_holds_are_refused(client, server):
    """A body of 100 kB could ask for an answer of gigabytes, which is made in memory."""
    body = {"prompt": [[65] * 300] * 40, "max_tokens": 0, "echo": True, "logprobs": 100}
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprobs"
    assert "at most 1048576" in refused.json()["error"]["message"]
    assert client.post("/v1/completions", json={**body, "logprobs": 1}).status_code == 200
    server.assert_nothing_left()


def test_stop_strings_have_a_length(client):
    """Text that may begin one is looked at again with each token, by the engine's own thread."""
    for stop in ("x" * 1025, ["y", "x" * 1025]):
        refused = client.post("/v1/completions", json={"prompt": "x", "stop": stop})
        assert refused.status_code == 400 and "at most 1024 characters" in refused.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "x", "stop": "x" * 1024, "max_tokens": 1}).status_code == 200


# -- structured output ------------------------------------------------------------------------------------------------


def test_slow_grammars_delay_only_those_who_send_them(monkeypatch):
    """Two threads compile; who waits too long for them is told to come back, and everybody else is served."""
    from warploom.engine.serving import structured_output as grammar

    monkeypatch.setattr(grammar, "TIME_LIMIT", 2.0)
    build, done, begun = grammar._build, threading.Event(), []
    monkeypatch.setattr(grammar, "_build", lambda *source: begun.append(1) or (done.wait(60) and build(*source)))
    with serving() as server, httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(6) as others:
        threads = threading.active_count()
        bodies = [{"prompt": "x", "max_tokens": 9, "regex": f"slow{i}"} for i in range(5)]
        asked = [others.submit(client.post, "/v1/completions", json=body) for body in bodies[:2]]
        server.wait(lambda: len(begun) == 2)
        monkeypatch.setattr(grammar, "TIME_LIMIT", 0.2)  # whoever comes from here on finds both threads taken
        asked += [others.submit(client.post, "/v1/completions", json=body) for body in bodies[2:]]
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [400, 400, 503, 503, 503]
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
        server.wait(lambda: client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200)
        server.assert_nothing_left()


# -- connections ------------------------------------------------------------------------------------------------------


def limits(**changed):
    from warploom.engine.server.http_protocol import Limits

    return {"options": {"limits": Limits(**changed)}}


def connect(server, sent=b"", receive_buffer=None):
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(60)
    client.connect(server.socket.getsockname())
    client.sendall(sent)
    return client


def connect_and_stall(server, body):
    """A client that asks and never reads, behind small buffers."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    client = connect(server, post(body), receive_buffer=4096)
    server.wait(lambda: server.bridge.flows)
    return client


@contextmanager
def still(server):
    """The event loop waits inside: what happens in here, it meets all at once, and no limit of time runs."""
    go = threading.Event()
    server.bridge._loop.call_soon_threadsafe(go.wait, 60)
    try:
        yield
    finally:
        go.set()


def first_answered(clients):
    """Which of several clients hears something first, and the beginning of it."""
    (client, *_), _, _ = select.select(clients, [], [], 60)
    return client, client.recv(99)


def read_all(client):
    """What arrives until the other side closes."""
    data = b""
    try:
        while part := client.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


def post(body):
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def test_large_heads_are_431_and_the_connection_closes(server):
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    endings = {
        "one endless field": b"a: " + b"a" * 66_000,
        "a complete field": b"a: " + b"a" * 66_000 + b"\r\n\r\n",
        "many fields": b"".join(b"a%d: 1\r\n" % i for i in range(101)) + b"\r\n",
    }
    for name, ending in endings.items():
        assert read_all(connect(server, head + ending)).startswith(b"HTTP/1.1 431"), name
    assert read_all(connect(server, b"GET /" + b"a" * 66_000)).startswith(b"HTTP/1.1 431")
    allowed = head + b"".join(b"a%d: %s\r\n" % (i, b"b" * 600) for i in range(97)) + b"connection: close\r\n\r\n"
    assert read_all(connect(server, allowed)).startswith(b"HTTP/1.1 200")


def test_large_and_pipelined_requests_pass(server):
    """Large bodies and pipelined requests pass the limits."""
    one = post({"prompt": "x", "max_tokens": 1, "user": "u" * 300_000})
    client = connect(server, one * 2 + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert read_all(client).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET /hea", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n", b"HTTP/1.1 408"),
        (b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he", b"HTTP/1.1 200"),
    ],
)
def test_what_is_never_finished_is_closed(sent, status):
    with serving(**limits(head_seconds=0.3, body_seconds=0.3)) as server:
        with still(server):
            client = connect(server, sent)
        assert read_all(client).startswith(status)


def test_slow_body_must_make_progress(monkeypatch):
    """A byte now and then does not count: a hundred connections were held that way."""
    with serving(**limits(body_seconds=0.5)) as server:
        client = connect(server, b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(200):
                client.sendall(b" ")
                time.sleep(0.05)


def test_chunks_take_a_bounded_share(server):
    """A chunk's extension and many tiny chunks: what is no body counts too."""
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    body = json.dumps({"prompt": "x" * 9000}).encode()
    tiny = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert read_all(connect(server, head + tiny)).startswith(b"HTTP/1.1 200")
    assert read_all(connect(server, head + b"1;" + b"a" * 90_000)).startswith(b"HTTP/1.1 413")


def test_client_of_http_1_0_gets_no_chunks(server):
    """A proxy that speaks the old version hands chunk sizes on to its client as text."""
    for stream in (False, True):
        sent = post({"prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": stream}).replace(b"1.1", b"1.0")
        head, _, body = read_all(connect(server, sent)).partition(b"\r\n\r\n")
        assert b"200 OK" in head and b"transfer-encoding" not in head and b"connection: close" in head
        assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["choices"]
        assert not stream or body.startswith(b"data: {")


def test_no_client_holds_all_memory_for_bodies():
    """A thousand slow bodies of 4 MB were 4 GB, before anything of them was judged."""
    keys = ("one", "two")
    with serving(keys=keys, max_body_bytes=1 << 16) as server:

        def send(key):
            head = f"POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 65000\r\n"
            return connect(server, f"{head}content-type: application/json\r\n\r\n".encode() + b" " * 64_000)

        clients = [send("one") for _ in range(40)]
        assert first_answered(clients)[1].startswith(b"HTTP/1.1 503")
        body = json.dumps({"prompt": "x" * 60_000}).encode()

        def served(key):
            head = {**JSON, "authorization": f"Bearer {key}"}
            return httpx.post(f"{server.url}/tokenize", content=body, headers=head, timeout=60).status_code

        assert served("one") == 503 and served("two") == 200
        for client in clients:
            client.close()
        server.wait(lambda: served("one") == 200)


def test_pipelined_request_waits_for_the_answer_before(monkeypatch):
    """The timer of a head that has begun does not cut off the answer that is still on its way."""
    with serving(HeldLLM, **limits(head_seconds=0.2, body_seconds=0.2)) as server:
        with still(server):
            client = connect(server, post({"prompt": "x", "max_tokens": 2}) + b"GET /hea")
        time.sleep(0.8)
        server.bridge.llm.free()
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


UNREAD = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}


def test_client_that_never_reads_keeps_no_place():
    """Its place is free when its generation ends, though nobody has read the answer."""
    with serving(max_batch=8, max_queue=0, **limits(send_seconds=1e6)) as server:
        stalled = connect_and_stall(server, UNREAD)
        server.wait(lambda: not server.bridge.open)
        assert server.bridge.flows
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.post("/v1/completions", json={"prompt": "x", "n": 8, "max_tokens": 2}).status_code == 200
        stalled.close()
        server.assert_nothing_left()


def test_client_that_never_reads_is_cut_off():
    with serving(max_batch=8, **limits(send_seconds=0.5)) as server:
        stalled = connect_and_stall(server, UNREAD)
        server.assert_nothing_left()
        stalled.close()


def test_stream_nobody_reads_ends_with_the_requests_time():
    body = {"prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}
    with serving(request_timeout=1.0, **limits(send_seconds=1e6)) as server:
        stalled = connect_and_stall(server, body)
        server.assert_nothing_left()
        stalled.close()


def test_no_key_takes_the_whole_queue():
    keys = ("one", "two", "three")
    with serving(lambda: HeldLLM(max_batch=4), keys=keys, max_queue=32) as server:

        def ask(key, n):
            return post({"prompt": "x", "n": n, "max_tokens": 2}).replace(
                b"host: x", b"host: x\r\nauthorization: Bearer " + key.encode()
            )

        first = [connect(server, ask("one", 12)) for _ in range(3)]
        server.wait(lambda: server.bridge.open == 24)
        refused, answer = first_answered(first)
        assert answer.startswith(b"HTTP/1.1 429")
        first.remove(refused)
        other = connect(server, ask("two", 6))
        server.wait(lambda: server.bridge.open == 30)
        last = connect(server, ask("three", 1))
        server.wait(lambda: server.bridge.open == 31)
        server.bridge.llm.free()
        for client in (*first, other, last):
            assert client.recv(99).startswith(b"HTTP/1.1 200")
        server.assert_nothing_left()


def test_drained_streams_end_with_their_error():
    """When the drain limit has passed: 57 of 200 streams once ended without a word."""
    server_options = {"drain_timeout": 1}
    with serving(HeldLLM, **server_options) as server:
        body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
        clients = [connect(server, post({**body, "stream": True})) for _ in range(3)]
        whole = connect(server, post(body))
        server.wait(lambda: len(server.bridge.flows) == 4 and all(flow.generations for flow in server.bridge.flows))
        server.bridge.llm.let(40)  # now, so that no client uses up the steps before the others have come
        for client in clients:
            assert client.recv(1 << 16)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for client in clients:
            assert b"engine is stopping" in read_all(client)
        assert read_all(whole).startswith(b"HTTP/1.1 503")
        server.bridge.llm.free()
        stopping.join()


# -- the log ----------------------------------------------------------------------------------------------------------


class Broken:
    def __init__(self, error=None, gate=None):
        self.error, self.gate, self.lines = error, gate, []

    def write(self, text):
        if self.gate is not None:
            self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.lines.append(text)

    def flush(self):
        pass


def test_log_that_cannot_be_written_costs_no_answer(monkeypatch):
    from warploom.engine.server import log

    full, gate = Broken(OSError(28, "No space left on device")), threading.Event()
    for stream in (full, Broken(gate=gate)):
        monkeypatch.setattr(log.WRITER, "_stream", stream)
        with serving(log=True) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            for _ in range(5):
                assert client.get("/health").status_code == 200
    gate.set()


def test_log_counts_the_lines_it_drops(monkeypatch):
    from warploom.engine.server import log

    monkeypatch.setattr(log, "LINES", 3)
    gate = threading.Event()
    stream = Broken(gate=gate)
    writer = log.LineWriter(stream)
    for number in range(9):
        writer.write(f"line {number}")
    gate.set()
    writer.flush()
    writer.write("last")
    writer.flush()
    text = "".join(stream.lines)
    assert "log lines were lost" in text and text.endswith("last\n")


def test_log_bounds_what_a_client_chose(capfd):
    with serving(log=True) as server:
        body = {"prompt": "x", "max_tokens": 1, "user": "u" * 100_000}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/{'p' * 9000}", timeout=60).status_code == 404
    assert max(map(len, capfd.readouterr().err.splitlines())) < 1000


# -- conversations ----------------------------------------------------------------------------------------------------

BAD_TEMPLATES = ["{{ 1 // 0 }}", "{{ 'x' + 1 }}", "{{ 10.0 ** 999 }}", "{% if %}", "{{ messages[9].content.x }}"]


def test_template_variables_cannot_break_a_chat(client, server):
    deep = value = {}
    for _ in range(150):
        value["a"] = value = {}
    hi = [{"role": "user", "content": "hi"}]
    for name in ("self", "cls", "source", "tokenizer", "value", "add_generation_prompt", "messages", "loop", "\n"):
        answer = client.post(
            "/v1/chat/completions", json={"messages": hi, "max_tokens": 1, "chat_template_kwargs": {name: 1}}
        )
        assert answer.status_code in (200, 400), (name, answer.text)
    for kwargs in (deep, {"x": "\ud83d"}):
        body = {"messages": hi, "max_tokens": 1, "chat_template_kwargs": kwargs}
        assert client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON).status_code in (200, 400)
    call = {"type": "function", "function": {"name": "f", "arguments": "[" * 5000 + "]" * 5000}}
    refused = client.post("/v1/chat/completions", json={"messages": [*hi, {"role": "assistant", "tool_calls": [call]}]})
    assert refused.status_code == 400 and "arguments" in refused.json()["error"]["message"]
    server.assert_nothing_left()


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_broken_template_is_refused_in_a_sentence(template, monkeypatch, client, server):
    monkeypatch.setattr(server.bridge.llm.tokenizer, "chat_template", template)
    refused = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert refused.status_code == 400 and "the chat template" in refused.json()["error"]["message"]


def test_prompt_far_beyond_the_context_is_not_tokenized(client, server, monkeypatch):
    llm, seen = server.bridge.llm, []
    encode = llm.tokenizer.encode
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, *rest: seen.append(len(text)) or encode(text, *rest))
    text = "word " * 400_000
    for path, body in (
        ("completions", {"prompt": text}),
        ("chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        refused = client.post(f"/v1/{path}", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert max(seen) <= 16 * llm.max_seq_len


# -- browsers ---------------------------------------------------------------------------------------------------------


def test_host_header_of_stranger_refused(client):
    """Host of a stranger is refused where names are known."""
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 200, "any host, unless told"
    with serving(allowed_hosts=("localhost",)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for host in ("localhost:8000", "localhost", "127.0.0.1:9", "[::1]:8000"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example"):
            assert client.get("/health", headers={"host": host}).status_code == 421, host


def test_two_host_headers_are_refused(server):
    """Which of them counts would be a matter of taste, and of the proxy before."""
    for two in (b"host: localhost\r\nhost: evil.example", b"Host: evil.example\r\nHost: localhost"):
        sent = b"GET /health HTTP/1.1\r\n" + two + b"\r\nconnection: close\r\n\r\n"
        assert read_all(connect(server, sent)).startswith(b"HTTP/1.1 400")


def test_pages_load_nothing_from_elsewhere(client):
    for path in ("/docs", "/"):
        policy = client.get(path).headers["content-security-policy"]
        assert "http" not in policy and "*" not in policy and "default-src 'self'" in policy
    assert "content-security-policy" not in client.get("/health").headers
