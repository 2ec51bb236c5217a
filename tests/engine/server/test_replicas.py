"""`warploom serve --replicas 2` as a user starts it: the same protocol, requests where their beginnings are, no end to
one replica's death."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.hub import save_model
from warploom.engine.model import Transformer
from warploom.engine.serving import LLM, SamplingParams

from .conftest import make_tokenizer

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
psutil = pytest.importorskip("psutil", reason="finds a replica's process by psutil")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("ray.serve", reason="replicas need the extra `cluster`")

LONG = {"max_tokens": 4000, "ignore_eos": True, "stream": True}
KEY = {"authorization": "Bearer secret"}


class Cluster:
    """A server with two replicas in a process of its own."""

    def __init__(self, directory):
        command = [sys.executable, "-m", "warploom.engine.cli", "serve", "--model", str(directory), "--port", "0"]
        command += ["--replicas", "2", "--no-ui", "--max-batch", "4", "--max-queue", "2"]
        environment = {**os.environ, "WARPLOOM_API_KEYS": "secret", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.url = re.search(r"http://\S+", self.process.stdout.readline()).group()
        self.log: list[str] = []
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=KEY)

    def health(self):
        answer = httpx.get(f"{self.url}/health", timeout=20)
        return answer.status_code, answer.json().get("replicas")

    def wait(self, condition, seconds=250):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, "waited in vain\n" + "".join(self.log[-5:])
            time.sleep(0.1)

    def complete(self, prompt, **others):
        return self.client.post("/v1/completions", json={"prompt": prompt, **others})

    def metric(self, name):
        """A metric's value at each replica."""
        found = re.findall(rf'^warploom:{name}{{.*replica="(\w+)".*}} (\S+)$', self.client.get("/metrics").text, re.M)
        return {replica: float(value) for replica, value in found}

    def end(self):
        """Kill whatever a failed test has left."""
        if self.process.poll() is None:
            family = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def replicas(self):
        """The replicas' processes."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [child] * any("ServeReplica" in part for part in child.cmdline())
        return found

    @contextmanager
    def without_replicas(self):
        """Inside, no replica is alive: they are killed, and those that replace them are held back as they begin."""
        over = threading.Event()

        def hold():
            while not over.wait(0.03):
                for replica in self.replicas():
                    with suppress(psutil.NoSuchProcess):
                        replica.suspend()

        for replica in self.replicas():
            replica.kill()
        holder = threading.Thread(target=hold)
        holder.start()
        try:
            self.wait(lambda: self.health() == (503, 0))
            yield
        finally:
            over.set()
            holder.join()
            for replica in self.replicas():
                replica.resume()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=260, d_model=32, n_layers=2, n_heads=2, max_seq_len=8192)
    return save_model(Transformer(config).eval(), tmp_path_factory.mktemp("models") / "small", make_tokenizer())


@pytest.fixture(scope="module")
def cluster(directory):
    cluster = Cluster(directory)
    try:
        assert cluster.health() == (503, 0), "nothing is served before the replicas have loaded"
        cluster.wait(lambda: cluster.health() == (200, 2))
        yield cluster
    finally:
        cluster.end()


def test_its_answers_are_those_of_one_engine_whole_or_streamed(cluster, directory):
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5, ignore_eos=True)
    alone = LLM(directory).generate("the same", params).text
    body = {"max_tokens": 30, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    assert cluster.complete("the same", **body).json()["choices"][0]["text"] == alone
    answer = cluster.complete("the same", stream=True, **body)
    lines = [line for line in answer.text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == alone


def test_its_routes_and_refusals_are_those_of_one_server(cluster):
    assert cluster.client.get("/v1/models").json()["data"][0]["id"] == "small"
    assert "/v1/chat/completions" in cluster.client.get("/openapi.json").json()["paths"]
    assert cluster.complete("x", n=0).json()["error"]["param"] == "n"
    assert cluster.complete("x", model="other").status_code == 404
    assert httpx.get(f"{cluster.url}/v1/models").status_code == 401
    large = cluster.client.post("/v1/completions", content=iter([b" " * (1 << 20)] * 5))
    assert large.status_code == 413 and "4194304 bytes" in large.json()["error"]["message"]
    ask = {"prompt": "x", "max_tokens": 3}
    answer = cluster.client.post("/v1/completions", json=ask, headers={"x-request-id": "r7"})
    assert answer.headers.get_list("x-request-id") == ["r7"] and answer.json()["id"] == "cmpl-r7"
    cluster.wait(lambda: any('"r7"' in line for line in cluster.log))
    line = json.loads(next(line for line in cluster.log if '"r7"' in line))
    assert line["completion_tokens"] == 3 and line["status"] == 200 and not line["client_left"]
    assert 'http_requests_total{method="POST",route="/v1/completions"' in cluster.client.get("/metrics").text


def test_prompts_that_begin_alike_find_their_pages_and_others_spread(cluster):
    before = cluster.metric("prompt_tokens_total")
    beginning = "a conversation that grows with every turn, and whose beginning is in somebody's cache; " * 2
    cached = []
    for turn in range(5):
        usage = cluster.complete(beginning * (turn + 1), max_tokens=2).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert all(after >= len(beginning) * turn - 16 for turn, after in enumerate(cached)), cached
    after = cluster.metric("prompt_tokens_total")
    assert sum(after[name] > before.get(name, 0) for name in after) == 1, "all of it at one replica"
    for number in range(20):
        cluster.complete(f"{number} is how this one begins", max_tokens=1)
    spread = cluster.metric("prompt_tokens_total")
    assert all(spread[name] > after[name] for name in after)


def test_a_client_that_leaves_stops_its_generation_at_the_replica(cluster):
    before = sum(cluster.metric("generation_tokens_total").values())
    with cluster.client.stream("POST", "/v1/completions", json={"prompt": "go on", **LONG}) as answer:
        next(answer.iter_lines())
    cluster.wait(lambda: not sum(cluster.metric("num_requests_running").values()), seconds=5)
    assert sum(cluster.metric("generation_tokens_total").values()) - before < 3500, "cancelled, not finished"
    assert not any(cluster.metric("kv_cache_usage_perc").values())


def test_when_all_queues_are_full_clients_are_told_to_come_back(cluster):
    with ThreadPoolExecutor(30) as pool:
        ask = {"max_tokens": 600, "ignore_eos": True}
        answers = list(pool.map(lambda number: cluster.complete(f"number {number}", **ask), range(30)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 12, "two replicas, each four and two that wait"
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


def test_a_replica_that_dies_fails_its_own_requests_and_is_replaced(cluster):
    def watch(number, started):
        with cluster.client.stream("POST", "/v1/completions", json={"prompt": f"{number} lives", **LONG}) as answer:
            lines = filter(None, answer.iter_lines())
            next(lines)
            started.release()
            return answer.status_code, [*lines][-1]

    started = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as pool:  # no replica is given more than four, and four run at a time
        streams = [pool.submit(watch, number, started) for number in range(6)]
        for _ in range(6):
            started.acquire(timeout=30)
        cluster.wait(lambda: all(cluster.metric("num_requests_running").values()))
        victim, survivor = cluster.replicas()
        victim.kill()
        ends = [stream.result(60) for stream in streams]
    broken = [last for _, last in ends if last != "data: [DONE]"]
    assert {status for status, _ in ends} == {200} and 0 < len(broken) < 6
    assert all(json.loads(last[6:])["error"]["code"] == "engine_error" for last in broken)
    assert cluster.complete("and after", max_tokens=2).status_code == 200, "the other one serves on"
    cluster.wait(lambda: len(cluster.metric("kv_cache_usage_perc")) == 2 and cluster.health() == (200, 2))
    assert survivor in cluster.replicas() and victim not in cluster.replicas()


def test_with_no_replica_alive_clients_are_told_when_to_come_back(cluster):
    with cluster.without_replicas():
        begin = time.monotonic()
        answer = cluster.complete("anybody there?", max_tokens=2)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "engine_unavailable" and time.monotonic() - begin < 15
    cluster.wait(lambda: cluster.health() == (200, 2))
    assert cluster.complete("and now?", max_tokens=2).status_code == 200


def test_told_to_stop_it_finishes_what_is_under_way_and_leaves_nobody_behind(cluster):
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    body = {"prompt": "to the end", **LONG, "max_tokens": 1000}
    with cluster.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        cluster.process.send_signal(signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert cluster.process.wait(40) == 130
    cluster.reader.join(10)
    assert "Traceback" not in "".join(cluster.log)
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
