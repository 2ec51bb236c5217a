"""The serving bench asks everyone for the same tokens, checks that they came, and knows what reading them costs."""

from functools import partial

import pytest

from warploom.bench import cold_start, peers
from warploom.bench.harness import Machine, Options
from warploom.bench.over_http import start
from warploom.bench.serve import Reply, Request, _answering, _notes, bounds, parts, serve, span, workload
from warploom.engine.config import ModelConfig

TINY = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 64, "max_seq_len": 64}


def test_the_shared_protocol_is_the_same_everywhere():
    work = workload(256, (100, 1024), (100, 1024), 1000)
    assert work == workload(256, (100, 1024), (100, 1024), 1000)
    assert all(100 <= len(request.prompt) <= 1024 and 100 <= request.tokens <= 1024 for request in work)
    assert all(0 <= token < 1000 for request in work for token in request.prompt)
    assert {request.tokens for request in workload(9, span("7"), span("7-7"), 5)} == {7}


def test_serve_bench_greedy_equals_transformers():
    """Greedy answers agree with transformers and everyone is timed."""
    machine = Machine("cpu", rounds=1)
    machine.ceilings["read"] = 1e10
    rows = serve(machine, "llama-tiny", "float32", requests=5, prompt="3-12", output="2-9", batch=2, **TINY)
    found = {row.who: row for row in rows}
    assert {"ours", "ours http", "transformers"} <= set(found)
    for who in ("ours", "ours http", "transformers", "transformers continuous"):
        row = found.get(who)
        if row is None or (row.missing and "not installed" in row.missing):
            continue
        assert row.missing is None
        assert row.extra["agrees"] == 1.0
        assert who == "ours http" or 0 < row.extra["ttft_p50_seconds"] <= row.extra["ttft_p99_seconds"]
        assert row.rate > 0 and row.limits["read"] > 0


def test_streams_over_http_say_what_the_engine_does():
    machine = Machine("cpu", rounds=1)
    machine.ceilings["read"] = 1e10
    shape = TINY | {"vocab_size": 300}
    protocol = {"requests": 4, "prompt": "3-12", "output": "2-9", "batch": 2, "also": "http stream", "rivals": False}
    rows = {row.who: row for row in serve(machine, "llama-tiny", "float32", **protocol, **shape)}
    assert set(rows) == {"ours", "ours http", "ours stream"}
    if not (rows["ours stream"].missing and "not installed" in rows["ours stream"].missing):
        assert rows["ours http"].extra["agrees"] == rows["ours stream"].extra["agrees"] == 1.0


def test_serve_bench_measures_batch_invariance_cost():
    """What repeatability costs is measured beside drawing freely and products of pytorch."""
    machine = Machine("cpu", rounds=1)
    machine.ceilings["read"] = 1e10
    protocol = {"requests": 4, "prompt": "3-12", "output": "5-9", "batch": 2, "also": "unseeded unsteady"}
    rows = serve(machine, "llama-tiny", "float32", **protocol, rivals=False, temperature=1.0, **TINY)
    agrees = {row.who: row.extra["agrees"] for row in rows}
    assert agrees["ours"] == 1.0 and agrees["ours unseeded"] < 1.0 and "ours unsteady" in agrees
    assert all(0 < row.extra["gap_p50_seconds"] <= row.extra["gap_p99_seconds"] for row in rows)


def test_cold_start_timed_from_process_and_model():
    """A cold start is timed from the process on and from the model on."""
    shape = TINY | {"vocab_size": 300}
    rows = cold_start.measure(Machine("cpu", rounds=1), "llama-tiny", "float32", rivals=False, **shape)
    found = {row.who: row for row in rows}
    assert set(found) == {"ours", "ours generate"} and found["ours generate"].missing is None
    assert 0 < found["ours"].extra["loaded_seconds"] < found["ours"].seconds.median
    assert found["ours"].extra["peak_bytes"] > 2**20


def test_every_round_asks_something_new():
    asked = []

    def answer(requests):
        asked.append([request.prompt for request in requests])
        return [Reply([0], []) for _ in requests]

    call = _answering(partial(answer, []), [Request([9, 9], 1), Request([8, 9], 1)], {}, "x")
    for _ in range(3):
        call()
    assert asked == [[[turn, 9], [turn, 9]] for turn in range(3)]


def test_serve_bench_too_few_tokens_refused():
    """A contestant that returns too few tokens is no contestant."""

    def stingy(requests):
        return [Reply([1], []) for _ in requests]

    call = _answering(partial(stingy, []), [Request([1, 2], 3)], {}, "stingy")
    with pytest.raises(ValueError, match="returned 1 tokens where 3 were asked for"):
        call()
    gone = peers.Missing("gone")
    assert _answering(gone, [], {}, "gone") is gone


def test_bound_counts_weights_and_past():
    """The bound counts weights once a step and each token s own past."""
    config = ModelConfig.preset("llama-tiny", **TINY)
    weights = 4 * config.parameter_count(embeddings=False)
    past = sum(10 + index + 0.5 for index in range(8)) * config.kv_bytes_per_token(4)
    one = [Request([0] * 10, 8)]
    assert bounds(config, "bfloat16", one, 1, weight_bytes=1)["read"] == 8 * weights / 4 + past / 2
    assert bounds(config, "float32", [Request([0] * 10, 1)] * 2, 2) == {
        "matmul float32": 20 * config.flops_per_token(10, training=False)
    }
    assert set(bounds(config, "bfloat16", [Request([0], 1)], 1, weight_bytes=1)) == {"matmul int8"}
    assert bounds(config, "float32", one, batch=1) == {"read": 8 * weights + past}
    assert bounds(config, "float32", one * 4, batch=4) == {"read": 8 * weights + 4 * past}
    assert bounds(config, "float32", one * 4, batch=2) == {"read": 16 * weights + 4 * past}


def test_latencies_are_percentiles_over_requests():
    replies = [Reply([1, 2, 3], [float(first), first + 4.0]) for first in range(1, 101)]
    notes = _notes(replies, [*replies[:99], Reply([9], [])])
    assert (notes["ttft_p50_seconds"], notes["ttft_p99_seconds"], notes["gap_p50_seconds"]) == (51.0, 100.0, 2.0)
    assert notes["agrees"] == 0.99


def test_serve_bench_gpu_protocol_first_and_fits(monkeypatch):
    """The whole protocol comes first on a gpu and every part fits its model."""
    monkeypatch.setattr("warploom.bench.environment._sees_gpu", lambda: True)
    for device in ("cpu", "cuda"):
        listed = parts(Options(device=device))
        assert listed[0].name == "mixed"
        for part in listed:
            settings = {name: value for name, value in part.config.items() if name in TINY}
            config = ModelConfig.preset(part.config["preset"], **settings)
            longest = [span(part.config.get(name, "16"))[1] for name in ("prompt", "output")]
            assert sum(longest) <= config.max_seq_len
    assert parts(Options(device="cuda"))[0].config["requests"] == 256


def test_a_server_that_does_not_start_is_quoted(tmp_path):
    pytest.importorskip("uvicorn")
    with pytest.raises(RuntimeError, match=r"config\.json"):
        start(str(tmp_path))
