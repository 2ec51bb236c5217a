"""Decoding by recorded graphs, with a stand-in for the recording: on a CPU all of it but the GPU's own part."""

import contextlib
import warnings

import numpy as np
import pytest
import torch

from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.execution import cuda_graphs as graphs
from warploom.engine.serving.execution.cuda_graphs import DecodeGraphs, Shape, graph_memory, record_cuda, shapes
from warploom.engine.serving.execution.gpu_model import batch_invariant_linear, fused_model

PROMPTS = [[i * (n + 3) % 97 for i in range(n)] for n in (9, 30, 2, 17, 41, 5)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class Recorder:
    """Stands in for a GPU: a replay runs again, and leaves its result where the recording left its own."""

    def __init__(self, fails_at: int | None = None):
        self.fails_at, self.recorded, self.replayed = fails_at, 0, 0

    def __call__(self, run):
        self.recorded += 1
        if self.recorded == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        result = run()

        def replay():
            self.replayed += 1
            return tuple(kept.copy_(new) for kept, new in zip(result, run()))

        return replay


def tokens_of(llm):
    return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


def graphed(model, recorder, max_batch=5):
    """An `LLM` that serves as on a GPU, by the kernels' eager twins."""
    llm = LLM(model, max_batch=max_batch)
    runner = llm.engine.runner
    runner.model, runner.store.layers, runner.least_tokens = fused_model(model, batch_invariant_linear), None, 1
    runner.record_graphs(recorder)
    return llm


@pytest.mark.parametrize("shape", ["llama", "qwen3", "mixtral", "gpt2"])
def test_graphs_replayed_same_tokens(tiny_model, shape):
    model, recorder = tiny_model(shape), Recorder()
    llm = graphed(model, recorder)
    assert recorder.recorded == len(llm.engine.runner.graphs.replays) == 4, "1, 2, 4 and 5 sequences, at start-up"
    assert tokens_of(llm) == tokens_of(LLM(model))
    assert recorder.replayed > 0 and recorder.recorded == 4


def test_graphs_draw_what_steps_without_draw(model):
    """Also where the logits are changed or described, for which the runner draws once more."""
    kinds = [
        {"temperature": 0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}, {"temperature": 1.0, "logprobs": 2},
        {"frequency_penalty": 0.7}, {"logit_bias": {5: 4.0}}, {"prompt_logprobs": 1},
    ]  # fmt: skip
    params = [SamplingParams(max_tokens=9, ignore_eos=True, seed=i, **kind) for i, kind in enumerate(kinds)]
    recorder = Recorder()
    for some in (slice(0, 2), slice(0, 6)):
        found, expected = (one.generate(PROMPTS[some], params[some]) for one in (graphed(model, recorder), LLM(model)))
        assert [x.token_ids for x in found] == [x.token_ids for x in expected]
    assert recorder.replayed > 0 and [len(x.logprobs or ()) for x in found] == [0, 0, 9, 0, 0, 0]


@pytest.mark.parametrize("fails_at", [1, 3])
def test_graphs_failed_recording_serves(model, fails_at):
    """What was recorded before is larger, and serves smaller batches too; without any, steps run as they are."""
    recorder = Recorder(fails_at)
    with pytest.warns(UserWarning, match=r"recording . sequences of 16 pages failed \(operation not permitted") as said:
        llm = graphed(model, recorder)
    assert len([each for each in said if each.category is UserWarning]) == 1, "others may be of anything collected here"
    assert recorder.recorded == fails_at
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert tokens_of(llm) == tokens_of(LLM(model))
    assert bool(recorder.replayed) == (fails_at > 1)


def test_graphs_disabled_by_environment(monkeypatch):
    assert graphs.enabled()
    monkeypatch.setenv("WARPLOOM_GRAPHS", "0")
    assert not graphs.enabled()


def test_shapes_largest_first_and_few():
    known = shapes(max_batch=256, most_pages=2560, page_size=16)
    assert known[0] == Shape(256, 2560) and known[-1] == Shape(1, 64)
    assert {shape.pages for shape in known} == {64, 128, 256, 512, 1024, 2048, 2560}
    assert {shape.size for shape in known} == {1, 2, 4, 8, 16, 32, 64, 128, 192, 256}
    work = [shape.size * shape.pages for shape in known]
    assert work == sorted(work, reverse=True)
    assert shapes(3, 5, 16) == [Shape(3, 5), Shape(2, 5), Shape(1, 5)]


def test_graphs_smallest_that_fits_replays(model):
    used = []
    llm = LLM(model, max_batch=8)
    runner = llm.engine.runner

    def record(run):
        shape = run.args[0]
        return lambda: used.append(shape) or (torch.zeros(shape.size, 8), torch.zeros(shape.size))

    decode = DecodeGraphs(fused_model(model, None), runner.store, runner.tokens, 300, record, draw=None)
    one = np.ones(3, dtype=np.int64)
    for pages in (1, 64, 65, 300):
        table = np.zeros((8, pages), dtype=np.int32)
        positions = np.full(3, 16 * pages - 1)
        layout = runner.store.layout(table, np.arange(3), positions, np.ones(3, dtype=np.int32))
        assert [len(x) for x in decode(one, np.arange(3), layout)] == [3, 3]
    assert used == [Shape(4, 64), Shape(4, 64), Shape(4, 128), Shape(4, 300)]
    too_long = runner.store.layout(np.zeros((8, 301), np.int32), np.arange(3), np.full(3, 4810), np.ones(3, np.int32))
    assert decode(one, np.arange(3), too_long) is None


def test_graph_memory_covers_segments(model):
    """Qwen3-0.6B's split-KV results alone are 64 rows · 16 heads · 160 segments · 130 numbers."""
    from warploom.engine.config import ModelConfig

    config = ModelConfig.preset("qwen3-0.6b")
    needed = graph_memory(config, 64, 40960, 2)
    assert 64 * 16 * 160 * 130 * 4 < needed < 1 << 30
    assert graph_memory(config, 256, 40960, 2) > 3 * needed // 2


def test_record_cuda_shares_a_pool_in_thread_local_mode(monkeypatch):
    """The calls of PyTorch's that a GPU would get."""
    asked = []

    @contextlib.contextmanager
    def graph(_graph, pool, capture_error_mode):
        asked.append((pool, capture_error_mode))
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            asked.append("replay")

    fakes = {"graph": graph, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}
    fakes |= {"stream": contextlib.nullcontext, "graph_pool_handle": lambda: "pool"}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record, runs = record_cuda(), []
    replays = [record(lambda i=i: runs.append(i) or torch.tensor(i)) for i in range(2)]
    assert [replay().item() for replay in replays] == [0, 1]
    assert runs == [0, 0, 1, 1], "once to compile, once recorded, never again"
    assert asked == [("pool", "thread_local")] * 2 + ["replay"] * 2
