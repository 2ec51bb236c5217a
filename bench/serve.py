"""Serving speed: many requests of random tokens, answered together.

The shared protocol: a fixed seed, prompt and output lengths uniform in a range, random token ids on random weights, end
of text ignored, greedy, nothing remembered from one round to the next. Its size is scaled to the device. Beside it,
batches of 1, 8 and 32 requests of one length show the two ends of the scale: weights read for one token, and for many.

The bound is bandwidth: every step reads all weights once, and the keys and values of each request. Shares are those
bytes over the read rate measured in the same run. Every contestant loads the same model directory, and must return as
many tokens as were asked for; `agrees` is the share of requests whose tokens are the same as ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import peers
from .harness import Machine, Options, Part
from .schema import Row, Value
from .timing import WallTimer

ROOMS = ("engine/config.py", "engine/model.py", "engine/serving", "kernels", "csrc")
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how many tokens to generate."""

    prompt: list[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for a request, and when: seconds after the whole workload was submitted."""

    tokens: list[int]
    times: list[float]
    """When each token, or at least the first and the last, was there; empty where a contestant cannot say."""


Server = Callable[[list[Request]], list[Reply]]
"""Answers a workload; may have a `close()` that ends its threads."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a contestant serves with."""

    directory: Path
    """The model directory."""
    dtype: str
    device: str
    batch: int
    """Most requests at a time."""
    context: int
    """Longest prompt with its output."""


def parts(options: Options) -> list[Part]:
    """On a GPU the 0.6B shape under the whole protocol first; on a CPU a 30M model and a protocol scaled to it."""
    from .environment import find_device

    if (options.device or find_device()) == "cuda":
        shape = {"preset": "qwen3-0.6b", "dtype": "bfloat16"}
        protocol = {"requests": 256, "prompt": "100-1024", "output": "100-1024", "batch": 256}
        fixed, minutes = {"prompt": "128", "output": "256"}, 2.0
    else:
        shape = {"preset": "llama-tiny", "dtype": "bfloat16", "d_model": 512, "n_layers": 8, "n_heads": 8}
        shape |= {"n_kv_heads": 8, "vocab_size": 8192, "max_seq_len": 512}
        protocol = {"requests": 32, "prompt": "16-160", "output": "16-160", "batch": 32}
        fixed, minutes = {"prompt": "128", "output": "64"}, 1.5
    batches = {size: {"requests": size, "batch": size} for size in (1, 8, 32)}
    return [
        Part("mixed", serve, shape | protocol, minutes=2 * minutes),
        *(Part(f"batch {size}", serve, shape | fixed | batch, minutes=minutes) for size, batch in batches.items()),
        Part("prefill 32", serve, shape | batches[32] | {"prompt": "128", "output": "1"}, minutes=minutes),
        Part("batch 8 float32", serve, shape | fixed | batches[8] | {"dtype": "float32"}, minutes=minutes),
    ]


def serve(
    machine: Machine, preset: str, dtype: str, requests: int, prompt: str, output: str, batch: int, **overrides: int
) -> list[Row]:
    """Ours, in full precision and with int8 weights, against every peer on one workload."""
    from ..engine.config import ModelConfig

    config = ModelConfig.preset(preset, **overrides)
    work = workload(requests, span(prompt), span(output), config.vocab_size)
    prefill = all(request.tokens == 1 for request in work)
    amount = sum(len(request.prompt) if prefill else request.tokens for request in work)
    case = f"{preset if not overrides else 'llama'} {dtype}, {requests} × {prompt}→{output}"
    limits = _limits(config, dtype, work, batch, prefill)
    rates = Machine(machine.device, WallTimer(), rounds=machine.rounds, seconds=machine.seconds)
    for name in limits:
        rates.ceilings[name] = machine.ceiling(name)
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        _save_random(config, dtype, machine.device, directory)
        job = Job(directory, dtype, machine.device, batch, max(len(r.prompt) + r.tokens for r in work))
        builders = {"ours": partial(ours, job), "ours int8": partial(ours, job, quantize="int8")}
        builders |= peers.build("serve", job)
        replies: dict[str, list[Reply]] = {}
        ready, extra = rates.prepare({who: _started(build, work) for who, build in builders.items()})
        calls = {who: _answering(call, work, replies, who) for who, call in ready.items()}
        try:
            rows = rates.compare(case, calls, amount=amount, unit="tok", limits=limits, extra=extra, warmup=1, least=1)
        finally:
            for call in ready.values():
                getattr(getattr(call, "func", None), "close", lambda: None)()
        return [replace(row, extra=row.extra | _notes(replies.get(row.who), replies["ours"])) for row in rows]


def workload(count: int, prompt: tuple[int, int], output: tuple[int, int], vocab_size: int) -> list[Request]:
    """`count` requests with lengths uniform in the (inclusive) ranges, the same on every machine."""
    import numpy as np

    draw = np.random.default_rng(0)
    prompts, outputs = draw.integers(*prompt, count, endpoint=True), draw.integers(*output, count, endpoint=True)
    return [Request(draw.integers(vocab_size, size=length).tolist(), int(n)) for length, n in zip(prompts, outputs)]


def span(text: str) -> tuple[int, int]:
    """`100-1024` as its two ends; `128` is both."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def ours(job: Job, quantize: str | None = None) -> Server:
    """`LLM`, as a caller uses it, without the prefix cache."""
    from ..engine.serving import LLM, SamplingParams

    llm = LLM(
        job.directory, device=job.device, dtype=job.dtype, max_batch=job.batch, quantize=quantize,
        prefix_cache=False,  # the same prompts come back in every round
    )  # fmt: skip

    def run(requests: list[Request]) -> list[Reply]:
        params = [SamplingParams(max_tokens=r.tokens, temperature=0.0, ignore_eos=True) for r in requests]
        outputs = llm.generate([request.prompt for request in requests], params)
        start = min(output.metrics.arrival for output in outputs)
        ends = [(output.metrics.first_token, output.metrics.finished) for output in outputs]
        return [Reply(list(out.token_ids), [end - start for end in both]) for out, both in zip(outputs, ends)]

    return run


def _limits(config: Any, dtype: str, work: list[Request], batch: int, prefill: bool) -> dict[str, float]:
    """The least this workload must compute (prefill) or read (decode)."""
    if prefill:
        tokens = sum(len(request.prompt) for request in work)
        return {f"matmul {dtype}": tokens * config.flops_per_token(len(work[0].prompt), training=False)}
    steps = max(max(request.tokens for request in work), -(-sum(request.tokens for request in work) // batch))
    weights = config.parameter_count(active=True, embeddings=False) * ELEMENT[dtype]
    kept = sum(request.tokens * (len(request.prompt) + request.tokens / 2) for request in work)
    return {"read": steps * weights + kept * config.kv_bytes_per_token(ELEMENT[dtype])}


def _save_random(config: Any, dtype: str, device: str, directory: Path) -> None:
    import torch

    from ..engine.hub import save_model
    from ..engine.model import Transformer

    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config)
    save_model(model.to(getattr(torch, dtype)), directory)


def _started(build: Callable[[], Server] | peers.Missing, work: list[Request]):
    """A builder whose call answers one short request: what a cold start to the first token takes."""
    if isinstance(build, peers.Missing):
        return build
    first = [Request(work[0].prompt[:16], 1)]
    return lambda: partial(build(), first)


def _answering(started: Any, work: list[Request], replies: dict[str, list[Reply]], who: str):
    """The call to time: the whole workload, by the server that was started; its replies are kept and counted."""
    if isinstance(started, peers.Missing):
        return started

    def call() -> None:
        replies[who] = started.func(work)
        short = [(len(reply.tokens), request.tokens) for reply, request in zip(replies[who], work)]
        if wrong := [pair for pair in short if pair[0] != pair[1]]:
            raise ValueError(f"returned {wrong[0][0]} tokens where {wrong[0][1]} were asked for")

    return call


def _notes(replies: list[Reply] | None, reference: list[Reply]) -> dict[str, Value]:
    """Latencies, and agreement with our tokens."""
    if not replies:
        return {}
    notes: dict[str, Value] = {}
    timed = [reply for reply in replies if reply.times]
    gaps = [(r.times[-1] - r.times[0]) / (len(r.tokens) - 1) for r in timed if len(r.tokens) > 1]
    for name, values in (("ttft", [reply.times[0] for reply in timed]), ("gap", gaps)):
        for percent in (50, 99) if values else ():
            notes[f"{name}_p{percent}_seconds"] = sorted(values)[min(len(values) - 1, len(values) * percent // 100)]
    same = sum(reply.tokens == other.tokens for reply, other in zip(replies, reference))
    return notes | {"agrees": same / len(replies)}
