"""What goes wrong: clients that leave, queues that fill, steps that fail, servers that stop."""

import asyncio
import gc
import itertools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from warploom.engine.errors import InputError
from warploom.engine.server.config import ServerConfig
from warploom.engine.server.request_stream import RequestStream
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.engine import Generation
from warploom.engine.serving.scheduling.sequence import Sequence

from .conftest import HeldLLM, Server, make_model, make_tokenizer, serving

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
psutil = pytest.importorskip("psutil", reason="memory is watched with psutil")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")

LONG = {"prompt": "go on", "max_tokens": 240, "ignore_eos": True, "stream": True}


@pytest.fixture
def held():
    with serving(lambda: HeldLLM(max_batch=4), max_queue=4) as server:
        yield server
        server.bridge.llm.free()


def client_of(server):
    return httpx.Client(base_url=server.url, timeout=60)


def raw(body):
    """A request as the bytes that are sent."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def test_client_gone_mid_stream_frees_pages(held):
    """A client that leaves mid stream stops its generation at once."""
    held.bridge.llm.let(40)
    with client_of(held) as client, client.stream("POST", "/v1/completions", json=LONG) as answer:
        next(answer.iter_lines())
    held.wait(lambda: not held.bridge.open)
    held.bridge.llm.free()
    held.assert_nothing_left()
    assert held.bridge.llm.engine.generated_tokens <= 41, "no step after the one that was under way"


def test_client_gone_before_answer_frees_pages(held):
    """A client that leaves before the answer stops its generation too."""
    with socket.create_connection(held.socket.getsockname()) as client:
        client.sendall(raw({**LONG, "stream": False, "n": 3}))
        held.wait(lambda: held.bridge.llm.engine.scheduler.running)
    held.wait(lambda: not held.bridge.open)
    held.bridge.llm.free()
    held.assert_nothing_left()
    assert held.bridge.llm.engine.generated_tokens <= 3


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"temperature": 1e-40, "top_p": 0.9}, 200),
        ({"temperature": 1e-39, "top_p": 0.5}, 200),
        ({"repetition_penalty": 1e-45, "top_p": 0.9}, 400),
    ],
)
def test_server_tiny_settings_do_not_end_it(client, settings, status):
    answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, **settings})
    assert answer.status_code == status, answer.text
    assert status == 200 or "greater than or equal to 0.01" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("error", "status"), [(InputError("prompt is odd"), 400), (ValueError("ours"), 500)])
def test_server_only_input_errors_are_the_clients(server, client, monkeypatch, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(server.bridge.llm, "submit", fail)
    answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
    assert answer.status_code == status
    assert (str(error) in answer.text) == (status == 400)


def test_server_nan_weights_answer_in_valid_json():
    def make():
        model = make_model()
        model.blocks[0].attention.qkv.weight.data[0, 0] = float("nan")
        return LLM(model, make_tokenizer())

    with serving(make) as server, client_of(server) as client:
        answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "top_p": 0.9, "logprobs": 2})
    assert answer.status_code == 200 and "NaN" not in answer.text
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0] * 2


def test_a_full_queue_answers_429_and_when_to_come_back(held):
    async def ask(client):
        return await client.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 20})

    async def rush():
        async with httpx.AsyncClient(base_url=held.url, timeout=60) as client:
            asking = [asyncio.create_task(ask(client)) for _ in range(30)]
            refused = [await answer for answer in itertools.islice(asyncio.as_completed(asking), 30 - 8)]
            held.bridge.llm.free()  # before, nobody can have been served
            return refused, await asyncio.gather(*asking)

    refused, answers = asyncio.run(rush())
    assert all(answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    assert [answer.status_code for answer in answers].count(200) == 8, "four that run and four that wait"
    held.assert_nothing_left()
    too_many = httpx.post(f"{held.url}/v1/completions", json={"prompt": "x", "n": 9}, timeout=60)
    assert too_many.status_code == 400 and "at most 8" in too_many.json()["error"]["message"]


def test_the_event_loop_answers_while_the_engine_computes(held):
    with client_of(held) as client, ThreadPoolExecutor(1) as other:
        asked = other.submit(client.post, "/v1/completions", json={"prompt": "x", "max_tokens": 4})
        held.wait(lambda: held.bridge.llm.engine.scheduler.running)
        assert [client.get("/health").status_code for _ in range(20)] == [200] * 20, "in the middle of a step"
        held.bridge.llm.free()
        assert asked.result().status_code == 200


def test_request_timeout_frees_pages():
    """A request that takes too long is told so and frees its pages."""
    with serving(HeldLLM, request_timeout=0.3) as server, client_of(server) as client:
        whole = client.post("/v1/completions", json={**LONG, "stream": False})
        assert whole.status_code == 504 and "0.3 s" in whole.json()["error"]["message"]
        assert whole.headers["x-should-retry"] == "false"
        server.bridge.llm.let(40)
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        server.bridge.llm.free()
        server.assert_nothing_left()


def test_failed_step_fails_its_requests_only():
    """A failed step fails its requests and nobody elses."""
    with serving() as server, client_of(server) as client:
        runner = server.bridge.llm.engine.runner
        launch = runner.launch

        def fail_once(plan):
            runner.launch = launch
            raise RuntimeError("secret: /root/weights is on fire")

        runner.launch = fail_once
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        server.assert_nothing_left()


def engines():
    """The engines made so far, and a function that makes one more."""
    made = []

    def make():
        made.append(LLM(make_model(), make_tokenizer()))
        return made[-1]

    return made, make


def burn(plan):
    raise RuntimeError("on fire")


def test_engine_broken_restarts_once_then_503():
    """A broken engine restarts once and then health stays 503."""
    made, make = engines()

    def break_it(client):
        made[-1].engine.runner.launch = burn
        return [client.post("/v1/completions", json={"prompt": "x"}).status_code for _ in range(3)]

    with serving(make) as server, client_of(server) as client:
        assert break_it(client) == [500, 500, 500]
        server.wait(lambda: len(made) == 2 and server.bridge.state == "ready")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200, "it has been built anew"
        break_it(client)
        server.wait(lambda: server.bridge.state == "failed")
        health, refused = client.get("/health"), client.post("/v1/completions", json={"prompt": "x"})
        assert health.status_code == 503 and health.json() == {"status": "failed"}
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_unavailable"
        assert 'warploom:engine_restarts_total{model_name="tiny"} 1.0' in client.get("/metrics").text


def test_restart_is_due_again_after_health(monkeypatch):
    from warploom.engine.server import async_engine

    monkeypatch.setattr(async_engine, "HEALTHY", 0.0)
    made, make = engines()

    with serving(make) as server, client_of(server) as client:
        for times in (1, 2, 3):
            made[-1].engine.runner.launch = burn
            for _ in range(3):
                client.post("/v1/completions", json={"prompt": "x"})
            server.wait(lambda times=times: len(made) == times + 1 and server.bridge.state == "ready")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_poison_request_harms_no_neighbor():
    with serving() as server, client_of(server) as client, ThreadPoolExecutor(12) as others:
        runner = server.bridge.llm.engine.runner
        launch = runner.launch

        def burn(plan):
            if any(255 in chunk.tokens for chunk in plan.chunks):
                raise RuntimeError("on fire")
            return launch(plan)

        runner.launch = burn
        body = {"max_tokens": 60, "ignore_eos": True, "logit_bias": {"255": -100}}
        asked = [
            others.submit(client.post, "/v1/completions", json={**body, "prompt": [1, number]}) for number in range(10)
        ]
        poisoned = client.post("/v1/completions", json={"prompt": [255], "max_tokens": 2})
        assert poisoned.status_code == 500
        assert [each.result().status_code for each in asked] == [200] * 10
        assert server.bridge.restarts == 0
        server.assert_nothing_left()


def test_a_dead_engine_thread_fails_those_who_wait(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with serving() as server, client_of(server) as client:

        def die(plan):
            raise SystemExit

        server.bridge.llm.engine.runner.launch = die
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        server.wait(lambda: server.bridge.restarts == 1 and server.bridge.state == "ready")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_loading_health_and_requests_503():
    """While the model loads health is 503 and so are requests."""
    loading = threading.Event()

    def make():
        loading.wait()
        return LLM(make_model(), make_tokenizer())

    server = Server(make, ServerConfig(name="tiny", log=False, ui=False)).start()
    try:
        with client_of(server) as client:
            assert client.get("/health").json() == {"status": "loading"}
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert client.get("/v1/models").status_code == 200 and client.get("/metrics").status_code == 200
            loading.set()
            server.wait_ready()
            assert client.get("/health").json() == {"status": "ok"}
    finally:
        loading.set()
        server.stop()


def test_stopping_lets_requests_under_way_finish(held):
    with client_of(held) as client, ThreadPoolExecutor(2) as others:
        asked = others.submit(client.post, "/v1/completions", json={**LONG, "stream": False, "max_tokens": 40})
        held.wait(lambda: held.bridge.llm.engine.scheduler.running)
        stopped = others.submit(held.stop)
        held.wait(lambda: held.socket.fileno() < 0)  # it listens no more
        held.bridge.llm.free()
        stopped.result()
        assert asked.result().status_code == 200 and asked.result().json()["usage"]["completion_tokens"] == 40


def left_behind():
    """What requests are made of, as far as it is still alive."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (RequestStream, Generation, Sequence)]


def still_grows(act, bound):
    """Detect a memory leak: resident memory grows by `bound` in each of twelve rounds, not just in some."""
    for _ in range(12):
        before = psutil.Process().memory_info().rss
        act()
        if psutil.Process().memory_info().rss - before < bound:
            return False
    return True


@pytest.mark.unsanitized("it keeps freed memory")
def test_two_thousand_vanishing_clients_leave_no_trace():
    async def vanish(host, port, number):
        reader, writer = await asyncio.open_connection(host, port)
        request = raw({**LONG, "seed": number})
        writer.write(request[: None if number % 5 else -(number % 80) - 1])
        await writer.drain()
        if number % 5 and number % 3:
            await reader.read(200 + number % 300)
        writer.transport.abort() if number % 2 else writer.close()

    before = len(left_behind())
    with serving(max_queue=1000) as server:
        host, port = server.socket.getsockname()

        async def rush(first):
            for start in range(first, first + 500, 50):
                await asyncio.gather(*(vanish(host, port, start + number) for number in range(50)))

        def come_and_go():
            asyncio.run(rush(next(firsts)))
            server.assert_nothing_left()
            server.wait(lambda: len(left_behind()) <= before)

        firsts = itertools.count(0, 500)
        for _ in range(3):
            come_and_go()
        assert not still_grows(come_and_go, 1 << 20), "500 more clients cost less than 2 kB each"
        engine = server.bridge.llm.engine
        done = engine.generated_tokens
        with client_of(server) as client:
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        assert engine.generated_tokens - done <= 3, "nobody else is being served"


@pytest.mark.unsanitized("it keeps freed memory")
def test_two_hundred_streams_complete(monkeypatch):
    """Two hundred streams at once are complete correct and none starves."""
    body = {"prompt": "together", "max_tokens": 16, "ignore_eos": True, "temperature": 0.8}

    async def ask(client, seed):
        text, ended = "", False
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True, "seed": seed}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                ended = ended or line == "data: [DONE]"
        return text, ended

    async def rush(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(200)))

    with serving(max_batch=64) as server:
        times, request = [], server.app.state.metrics.request

        def note(flow):
            times.extend((stream.metrics.arrival, stream.metrics.first_token) for stream in flow.streams)
            request(flow)

        monkeypatch.setattr(server.app.state.metrics, "request", note)
        answers = asyncio.run(rush(server.url))
        server.assert_nothing_left()
        firsts = [first for _, first in sorted(times)]

        def again():
            assert asyncio.run(rush(server.url)) == answers
            server.assert_nothing_left()

        assert not still_grows(again, 1 << 20), "two hundred more leave nothing behind"
    alone = LLM(make_model(), make_tokenizer())
    for seed, (text, ended) in enumerate(answers):
        params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=seed)
        assert ended and text == alone.generate("together", params).text
    assert len(firsts) == 200 and firsts == sorted(firsts), "first come, first served: nobody is overtaken"
