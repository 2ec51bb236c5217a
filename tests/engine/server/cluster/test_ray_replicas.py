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
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer
from warploom.engine.serving import LLM, SamplingParams

from ..conftest import make_tokenizer

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
psutil = pytest.importorskip("psutil", reason="finds a replica's process by psutil")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("ray.serve", reason="replicas need the extra `cluster`")

LONG = {"max_tokens": 30_000, "ignore_eos": True, "stream": True}  # half a minute at least
KEY = {"authorization": "Bearer secret"}


def start(directory):
    command = [sys.executable, "-m", "warploom.engine.cli", "serve", "--model", str(directory), "--port", "0"]
    command += ["--replicas", "2", "--no-ui", "--max-batch", "4", "--max-queue", "2"]
    environment = {**os.environ, "WARPLOOM_API_KEYS": "secret", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def replicas_of(process):
    """The replicas' processes."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [child] * any("ServeReplica" in part for part in child.cmdline())
    return found


class Cluster:
    """A server with two replicas in a process of its own."""

    def __init__(self, directory):
        self.process = start(directory)
        self.url = re.search(r"http://\S+", self.process.stdout.readline()).group()
        self.log: list[str] = []
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=KEY)

    def health(self):
        answer = httpx.get(f"{self.url}/health", timeout=60)
        return answer.status_code, answer.json().get("replicas")

    def wait(self, condition):
        """The condition's value, once it holds; fails if it never does."""
        end = time.monotonic() + 250
        while not (found := condition()):
            assert time.monotonic() < end and self.process.poll() is None, "waited in vain\n" + "".join(self.log[-5:])
            time.sleep(0.1)
        return found

    def complete(self, prompt, **others):
        return self.client.post("/v1/completions", json={"prompt": prompt, **others})

    def metric(self, name):
        """A metric's value at each of the two replicas."""
        line = re.compile(rf'^warploom:{name}{{.*replica="(\w+)".*}} (\S+)$', re.M)

        def told():
            found = line.findall(self.client.get("/metrics").text)
            return len(found) == 2 and {replica: float(value) for replica, value in found}

        return self.wait(told)

    def end(self):
        """Kill whatever a failed test has left."""
        if self.process.poll() is None:
            each([*psutil.Process(self.process.pid).children(recursive=True), self.process], "kill")

    def replicas(self):
        return replicas_of(self.process)

    @contextmanager
    def without_replicas(self):
        """Inside, no replica is alive: they are killed, and those that replace them are held back as they begin."""
        over = threading.Event()

        def hold():
            while not over.wait(0.03):
                each(self.replicas(), "suspend")

        each(self.replicas(), "kill")
        holder = threading.Thread(target=hold)
        holder.start()
        try:
            self.wait(lambda: self.health() == (503, 0))
            yield
        finally:
            over.set()
            holder.join()
            each(self.replicas(), "resume")


def each(processes, act):
    """Do the same to some processes, those that have ended meanwhile apart."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            getattr(process, act)()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=260, d_model=32, n_layers=2, n_heads=2, max_seq_len=40_000)
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


def test_proxy_answers_equal_one_engine(cluster, directory):
    """Its answers are those of one engine whole or streamed."""
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5, ignore_eos=True)
    alone = LLM(directory, max_batch=1).generate("the same", params).text
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
    assert httpx.get(f"{cluster.url}/v1/models", timeout=60).status_code == 401
    large = cluster.client.post("/v1/completions", content=iter([b" " * (1 << 20)] * 5))
    assert large.status_code == 413 and "4194304 bytes" in large.json()["error"]["message"]
    ask = {"prompt": "x", "max_tokens": 3}
    answer = cluster.client.post("/v1/completions", json=ask, headers={"x-request-id": "r7"})
    assert answer.headers.get_list("x-request-id") == ["r7"] and answer.json()["id"] == "cmpl-r7"
    cluster.wait(lambda: any('"r7"' in line for line in cluster.log))
    line = json.loads(next(line for line in cluster.log if '"r7"' in line))
    assert line["completion_tokens"] == 3 and line["status"] == 200 and not line["client_left"]
    assert 'http_requests_total{method="POST",route="/v1/completions"' in cluster.client.get("/metrics").text


def test_proxy_prefixes_stay_others_spread(cluster):
    """Prompts that begin alike find their pages and others spread."""
    before = cluster.metric("prompt_tokens_total")
    beginning = "a conversation that grows with every turn, and whose beginning is in somebody's cache; " * 2
    cached = []
    for turn in range(5):
        usage = cluster.complete(beginning * (turn + 1), max_tokens=2).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert all(after >= len(beginning) * turn - 16 for turn, after in enumerate(cached)), cached
    after = cluster.metric("prompt_tokens_total")
    assert sum(after[name] > before[name] for name in after) == 1, "all of it at one replica"
    for number in range(20):
        cluster.complete(f"{number} is how this one begins", max_tokens=1)
    spread = cluster.metric("prompt_tokens_total")
    assert all(spread[name] > after[name] for name in after)


def test_proxy_client_gone_stops_replica(cluster):
    """A client that leaves stops its generation at the replica."""
    before = sum(cluster.metric("generation_tokens_total").values())
    with cluster.client.stream("POST", "/v1/completions", json={"prompt": "go on", **LONG}) as answer:
        next(answer.iter_lines())
    cluster.wait(lambda: not any(cluster.metric("num_requests_running").values()))
    generated = sum(cluster.metric("generation_tokens_total").values()) - before
    assert generated < LONG["max_tokens"], "cancelled, not finished"
    assert not any(cluster.metric("kv_cache_usage_perc").values())


def test_proxy_full_queues_answer_503(cluster):
    """When all queues are full clients are told to come back."""
    refused, seen = threading.Semaphore(0), threading.Event()

    def ask(number):
        body = {"prompt": f"number {number}", **LONG}
        with cluster.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                refused.release()
            seen.wait()  # who is served stays until all others have been told
            return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(ask, number) for number in range(30)]
        for _ in range(30 - 12):
            refused.acquire()
        seen.set()
    answers = [each.result() for each in asked]
    assert answers.count((200, None)) == 12, "two replicas, each four and two that wait"
    assert all(status == 200 or (status == 429 and int(seconds) >= 1) for status, seconds in answers)


def test_proxy_dead_replica_is_replaced(cluster):
    """A replica that dies fails its own requests and is replaced."""

    def watch(number, started):
        body = {"prompt": f"{number} lives", **LONG, "max_tokens": 4000}
        with cluster.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = filter(None, answer.iter_lines())
            next(lines)
            started.release()
            return answer.status_code, [*lines][-1]

    started, (victim, survivor) = threading.Semaphore(0), cluster.replicas()
    with ThreadPoolExecutor(6) as pool:  # no replica is given more than four, and four run at a time
        streams = [pool.submit(watch, number, started) for number in range(6)]
        for _ in range(6):
            started.acquire()
        victim.kill()
        ends = [stream.result() for stream in streams]
    broken = [last for _, last in ends if last != "data: [DONE]"]
    assert {status for status, _ in ends} == {200} and 0 < len(broken) < 6
    assert all(json.loads(last[6:])["error"]["code"] == "engine_error" for last in broken)
    assert cluster.complete("and after", max_tokens=2).status_code == 200, "the other one serves on"
    cluster.wait(lambda: cluster.metric("kv_cache_usage_perc") and cluster.health() == (200, 2))
    assert survivor in cluster.replicas() and victim not in cluster.replicas()


def test_proxy_no_replica_says_retry_after(cluster):
    """With no replica alive clients are told when to come back."""
    with cluster.without_replicas():
        answer = cluster.complete("anybody there?", max_tokens=2)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "engine_unavailable"
    cluster.wait(lambda: cluster.health() == (200, 2))
    assert cluster.complete("and now?", max_tokens=2).status_code == 200


def test_serve_stop_finishes_leaves_none_behind(cluster):
    """Told to stop it finishes what is under way and leaves nobody behind."""
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    body = {"prompt": "to the end", **LONG, "max_tokens": 1000}
    with cluster.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        cluster.process.send_signal(signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert cluster.process.wait() == 130
    cluster.reader.join()
    assert "Traceback" not in "".join(cluster.log)
    _, alive = psutil.wait_procs(children, 60)
    assert not alive


def test_replicas_stop_while_starting(directory):
    """Told to stop while it starts it starts no replica."""
    process, seen = start(directory), []
    process.stdout.readline()
    while not psutil.Process(process.pid).children():  # Ray's own are the first
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        seen += replicas_of(process)
        time.sleep(0.05)
    assert process.returncode == 130 and not seen
