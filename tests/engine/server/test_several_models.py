"""Several models in one server: loaded when asked for, unloaded within a limit of memory."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from warploom.engine.cli import main
from warploom.engine.errors import InputError
from warploom.engine.formats.model_writer import save_model
from warploom.engine.serving import LLM, SamplingParams

from .conftest import Server, ServerConfig, make_model, make_tokenizer

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")


def make(seed):
    return LLM(make_model(seed), make_tokenizer(), max_batch=4)


@pytest.fixture
def several():
    """A first model, and three of which two fit beside it; the order in which they were loaded."""
    from warploom.engine.server.model_pool import FurtherModel

    loaded = []

    def maker(name, seed):
        return lambda: loaded.append(name) or make(seed)

    further = {name: FurtherModel(maker(name, seed), 10) for seed, name in enumerate("abc", 1)}
    config = ServerConfig(name="tiny", log=False, ui=False)
    server = Server(lambda: make(0), config, further=further, memory=20).start().wait_ready()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield server, client, loaded
    server.stop()


def ask(client, model, **body):
    body = {"model": model, "prompt": "x", "max_tokens": 12, "temperature": 0, **body}
    return client.post("/v1/completions", json=body)


def test_models_are_loaded_on_use_and_unloaded_by_age(several):
    server, client, loaded = several
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "a", "b", "c"]
    assert client.get("/v1/models/b").json()["id"] == "b" and not loaded
    params = SamplingParams(max_tokens=12, temperature=0)
    for seed, name in enumerate(("tiny", "a", "b", "a", "c", "a", "b")):
        answer = ask(client, name)
        wanted = make(["tiny", "a", "b", "c"].index(name)).generate("x", params).text
        assert answer.json()["choices"][0]["text"] == wanted and answer.json()["model"] == name, seed
    assert loaded == ["a", "b", "c", "b"], "b was the least recently used when c came, then c"
    refused = ask(client, "d")
    assert refused.status_code == 404 and "'tiny', 'a', 'b', 'c'" in refused.json()["error"]["message"]
    chat = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200
    assert client.post("/v1/embeddings", json={"model": "b", "input": "x"}).status_code == 200
    server.assert_nothing_left()
    refused = client.get("/v1/models/d")
    assert refused.status_code == 404 and "'tiny', 'a', 'b', 'c'" in refused.json()["error"]["message"]


def test_metrics_have_the_gauges_of_each_model(several):
    _, client, _ = several

    def tokens():
        found = re.findall(
            r'^warploom:generation_tokens_total{model_name="(\w+)"} (\S+)', client.get("/metrics").text, re.M
        )
        return {name: float(value) for name, value in found}

    assert tokens() == {"tiny": 0}
    for name in ("tiny", "a", "b"):
        ask(client, name, ignore_eos=True)
    assert tokens() == {"tiny": 12, "a": 12, "b": 12}
    ask(client, "c")
    assert tokens().keys() == {"tiny", "b", "c"}, "a has been unloaded"
    assert 'engine_state{model_name="c",state="ready"} 1.0' in client.get("/metrics").text


def test_one_that_is_asked_for_by_many_is_loaded_once(several):
    _, client, loaded = several
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, "a").json()["choices"][0]["text"], range(8)))
    assert loaded == ["a"] and len(set(answers)) == 1


def test_busy_models_are_not_unloaded(several):
    _, client, loaded = several
    streams = [
        client.stream("POST", "/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 300, "n": 4,
                                                       "ignore_eos": True, "stream": True, "logprobs": 50})
        for name in "ab"
    ]  # fmt: skip
    gate = threading.Event()
    for name in "ab":
        ask(client, name)
    services = several[0].app.state.models.loaded
    for service in services.values():  # their steps wait
        launch = service.bridge.llm.engine.runner.launch
        service.bridge.llm.engine.runner.launch = lambda plan, launch=launch: gate.wait(60) and launch(plan)
    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(lambda s=s: s.__enter__().read()) for s in streams]
        several[0].wait(lambda: all(service.bridge.flows for service in services.values()))
        refused = ask(client, "c")
        assert refused.status_code == 503 and "no memory for 'c'" in refused.json()["error"]["message"]
        gate.set()
        assert all(b"[DONE]" in each.result() for each in reading)
    assert ask(client, "c").status_code == 200 and loaded == ["a", "b", "c"]


def test_model_that_cannot_be_loaded_is_said_and_tried_again():
    from warploom.engine.server.model_pool import FurtherModel

    tries = []

    def make_later():
        tries.append(1)
        if len(tries) == 1:
            raise InputError("config.json is not there")
        return make(1)

    config = ServerConfig(name="tiny", log=False, ui=False)
    further = {"late": FurtherModel(make_later, 1)}
    server = Server(lambda: make(0), config, further=further, memory=1).start().wait_ready()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        refused = ask(client, "late")
        assert refused.status_code == 503 and "config.json is not there" in refused.json()["error"]["message"]
        assert ask(client, "late").status_code == 200 and client.get("/health").status_code == 200
    server.stop()


def test_model_that_cannot_fit_is_refused_at_the_start(tmp_path, capsys):
    one, other = (save_model(make_model(seed), tmp_path / str(seed), make_tokenizer()) for seed in (0, 1))
    flags = ["serve", "--port", "0", "--no-ui", "--model", str(one), "--kv-memory", "1000000"]
    assert main([*flags, "--further-model", f"b={other}", "--model-memory", "1500000"]) == 2
    assert "model 'b' needs 0.00 GB for weights and pages; model_memory leaves" in capsys.readouterr().err
    assert main([*flags, "--further-model", f"0={other}"]) == 2
    assert "has the name of another model" in capsys.readouterr().err
    assert main([*flags, "--further-model", "b"]) == 2
    assert "further_model must be NAME=DIR, got 'b'" in capsys.readouterr().err
