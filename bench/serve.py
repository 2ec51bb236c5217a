"""Serving benchmark: throughput and latency of many random requests answered together.

The shared protocol: a fixed seed, prompt and output lengths uniform in a range, random token ids on random weights,
end of text ignored, greedy. Prompts begin differently in every round, so that no cache of prefixes helps. Its size is
scaled to the device. Beside it, batches of 1, 8 and 32 requests of one length show the two ends of the scale: weights
read for one token, and for many.

The bound is bandwidth: every step reads all weights once, and the keys and values of each request. Shares are those
bytes over the read rate measured in the same run. Every contestant loads the same model directory, and must return as
many tokens as were asked for; `agrees` is the share of requests whose tokens are the same as ours.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import cold_start, peers
from .harness import Machine, Options, Part
from .random_model import printable_tokenizer, save_random
from .schema import Row, Value

ROOMS = ("engine/config.py", "engine/model.py", "engine/serving", "engine/server", "kernels", "csrc")
PAGE = 16
FIRST = 32  # tokens a prompt may begin with: one a round
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how many tokens to generate."""

    prompt: list[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Tokens of a request and their times: seconds after the whole workload was submitted."""

    tokens: list[int]
    times: list[float]
    """When each token, or at least the first and the last, was there; empty where a contestant cannot say."""
    text: str = ""
    """Tokens, where there is a tokenizer; of a stream, whose tokens nobody is told, only they are counted."""


Server = Callable[[list[Request]], list[Reply]]
"""Answers a workload; may have a `close()` that ends its threads."""


@dataclass(frozen=True, slots=True)
class Job:
    """Model and settings of a serving contestant."""

    directory: Path
    """The model directory."""
    dtype: str
    device: str
    batch: int
    """Most requests at a time."""
    lengths: tuple[int, ...]
    """Tokens of the `batch` longest requests, output included: what the cache has to hold at most."""
    quantize: str | None = None
    """Whose weights are rounded to 8 bits."""
    temperature: float = 0.0

    def pages(self, size: int) -> int:
        """Pages of `size` tokens that all requests need."""
        return sum(-(-length // size) for length in self.lengths)

    @property
    def kv_memory(self) -> int:
        """Bytes of KV cache that all requests need."""
        from ..engine.formats.model_info import load_config

        return self.pages(PAGE) * PAGE * load_config(self.directory).kv_bytes_per_token(ELEMENT[self.dtype])


def parts(options: Options) -> list[Part]:
    """On a GPU the 0.6B shape under the whole protocol first; on a CPU a 30M model and a protocol scaled to it."""
    from .environment import find_device

    if find_device(options.device) == "cuda":
        shape = {"preset": "qwen3-0.6b", "dtype": "bfloat16"}
        protocol = {"requests": 256, "prompt": "100-1024", "output": "100-1024", "batch": 256, "also": ""}
        fixed, minutes = {"prompt": "128", "output": "256"}, 2.0
    else:
        shape = {"preset": "llama-tiny", "dtype": "bfloat16", "d_model": 512, "n_layers": 8, "n_heads": 8}
        shape |= {"n_kv_heads": 8, "vocab_size": 8192, "max_seq_len": 512}
        protocol = {"requests": 32, "prompt": "16-160", "output": "16-160", "batch": 32}
        fixed, minutes = {"prompt": "128", "output": "64"}, 1.5
    batches = {size: {"requests": size, "batch": size} for size in (1, 8, 32)}
    prompts = batches[32] | {"prompt": "128", "output": "1"}
    repeatable = batches[32] | {"rivals": False, "temperature": 1.0, "also": "unseeded unsteady"}
    small = {"quantize": "int8"}
    return [
        Part("mixed", serve, shape | protocol, minutes=2 * minutes),
        *(Part(f"batch {size}", serve, shape | fixed | batch, minutes=minutes) for size, batch in batches.items()),
        *(
            Part(f"batch {size} int8", serve, shape | fixed | batch | small | {"also": "kv16 http"}, minutes=minutes)
            for size, batch in batches.items()
        ),
        Part("prefill 32", serve, shape | prompts, minutes=minutes),
        Part("prefill 32 int8", serve, shape | prompts | small | {"also": "kv16 http"}, minutes=minutes),
        Part("mixed int8", serve, shape | protocol | small, minutes=2 * minutes),
        Part("repeatable", serve, shape | fixed | repeatable, minutes=minutes),
        Part("repeatable float32", serve, shape | fixed | repeatable | {"dtype": "float32"}, minutes=minutes),
        Part("cold start", cold_start.measure, shape, minutes=1.0),
        Part("cold start int8", cold_start.measure, shape | small, minutes=1.0),
        Part("http", serve, shape | protocol | {"also": "http stream", "rivals": False}, minutes=2 * minutes),
        Part("batch 8 float32", serve, shape | fixed | batches[8] | {"dtype": "float32"}, minutes=minutes),
    ]


def serve(
    machine: Machine,
    preset: str,
    dtype: str,
    requests: int,
    prompt: str,
    output: str,
    batch: int,
    also: str = "http",
    rivals: bool = True,
    quantize: str | None = None,
    temperature: float = 0.0,
    **overrides: int,
) -> list[Row]:
    """Ours (also over HTTP) against every peer with weights of the same precision, or alone."""
    from ..engine.config import ModelConfig

    config = ModelConfig.preset(preset, **overrides)
    work = workload(requests, span(prompt), span(output), config.vocab_size)
    case = f"{preset if not overrides else 'llama'} {quantize or dtype}, {requests} × {prompt}→{output}"
    limits = bounds(
        config, dtype, work, batch, 1 if quantize else None, 1 if quantize and machine.device == "cpu" else None
    )
    machine = machine.with_wall_clock()
    for name in limits:
        machine.ceiling(name)
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        tokenizer = printable_tokenizer(config) if "stream" in also else None
        save_random(config, dtype, machine.device, directory, tokenizer)
        lengths = sorted((len(request.prompt) + request.tokens for request in work), reverse=True)
        job = Job(directory, dtype, machine.device, batch, tuple(lengths[:batch]), quantize, temperature)
        builders = {"ours": partial(ours, job)} | {
            f"ours {name}": partial(VARIANTS[name], job) for name in also.split()
        }
        others = peers.build("serve", job) if rivals else {}
        rows, replies = _contest(machine, case, builders | others, work, limits)
    return [replace(row, extra=row.extra | _notes(replies.get(row.who), replies["ours"])) for row in rows]


def _contest(
    machine: Machine, case: str, builders: peers.Builders, work: list[Request], limits: dict[str, float]
) -> tuple[list[Row], dict[str, list[Reply]]]:
    """Start every server with one short request, then time the whole workload on each."""
    replies: dict[str, list[Reply]] = {}
    started, extra = machine.prepare({who: _starting(build, work) for who, build in builders.items()})
    for who in ("ours http", "ours stream"):
        extra.get(who, {}).pop("peak_bytes", None)  # its memory is another process's
    calls = {who: _answering(call, work, replies, who) for who, call in started.items()}
    amount = sum(len(request.prompt) if _prefill(work) else request.tokens for request in work)
    try:
        rows = machine.compare(case, calls, amount=amount, unit="tok", limits=limits, extra=extra, warmup=1, least=1)
    finally:
        for call in started.values():
            getattr(getattr(call, "func", None), "close", lambda: None)()
    return rows, replies


def workload(count: int, prompt: tuple[int, int], output: tuple[int, int], vocab_size: int) -> list[Request]:
    """`count` requests with lengths uniform in the (inclusive) ranges, reproducible on every machine."""
    import numpy as np

    draw = np.random.default_rng(0)
    prompts, outputs = draw.integers(*prompt, count, endpoint=True), draw.integers(*output, count, endpoint=True)
    return [Request(draw.integers(vocab_size, size=length).tolist(), int(n)) for length, n in zip(prompts, outputs)]


def span(text: str) -> tuple[int, int]:
    """Parse a range: `100-1024`, or `128` for both ends."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def ours(job: Job, seeded: bool = True, steady: bool = True, kv_dtype: str | None = None) -> Server:
    """`LLM`, recording when each token arrived."""
    from ..engine.serving import LLM, SamplingParams

    llm = LLM(
        job.directory, device=job.device, dtype=job.dtype, max_batch=job.batch, quantize=job.quantize,
        kv_memory=job.kv_memory, page_size=PAGE, batch_invariant=steady, kv_dtype=kv_dtype,
        max_seq_len=max(job.lengths),  # fewer graphs to record
    )  # fmt: skip

    def run(requests: list[Request]) -> list[Reply]:
        begin, times = time.monotonic(), [[] for _ in requests]

        def note(index: int, piece: Any) -> None:
            times[index] += [time.monotonic() - begin] * len(piece.token_ids)

        generations = []
        for index, request in enumerate(requests):
            params = SamplingParams(
                request.tokens, job.temperature, ignore_eos=True, seed=index if seeded else None
            )  # fmt: skip
            generations.append(llm.submit(request.prompt, params, on_piece=partial(note, index)))
        outputs = [generation.result() for generation in generations]
        return [Reply(list(out.token_ids), each, out.text) for out, each in zip(outputs, times)]

    return run


def behind_http(job: Job, stream: bool = False) -> Server:
    """`warploom serve`, with one client per request."""
    from .over_http import generate_all, start, stream_all

    flags = {"dtype": job.dtype, "device": job.device, "max-batch": job.batch, "kv-memory": job.kv_memory}
    flags |= {"max-queue": 4096, "page-size": PAGE} | ({"quantize": job.quantize} if job.quantize else {})
    address, stop = start(
        str(job.directory), *(text for name, value in flags.items() for text in (f"--{name}", str(value)))
    )

    def run(requests: list[Request]) -> list[Reply]:
        prompts, counts = [request.prompt for request in requests], [request.tokens for request in requests]
        if stream:
            return [Reply([-1] * count, [], text) for text, count in stream_all(address, prompts, counts)]
        return [Reply(tokens, []) for tokens in generate_all(address, prompts, counts)]

    run.close = stop
    return run


VARIANTS = {
    "http": behind_http, "stream": partial(behind_http, stream=True),
    "unseeded": partial(ours, seeded=False), "unsteady": partial(ours, steady=False),
    "kv16": partial(ours, kv_dtype="bfloat16"),
}  # fmt: skip


def bounds(
    config: Any,
    dtype: str,
    work: list[Request],
    batch: int,
    weight_bytes: int | None = None,
    cache_bytes: int | None = None,
) -> dict[str, float]:
    """Roofline of a workload: least FLOPs (prefill) or bytes (decode), by the ceiling it is held against."""
    if _prefill(work):
        tokens, name = sum(len(request.prompt) for request in work), "int8" if weight_bytes == 1 else dtype
        return {f"matmul {name}": tokens * config.flops_per_token(len(work[0].prompt), training=False)}
    steps = max(max(request.tokens for request in work), -(-sum(request.tokens for request in work) // batch))
    weights = config.parameter_count(active=True, embeddings=False) * (weight_bytes or ELEMENT[dtype])
    past = sum(request.tokens * (len(request.prompt) + request.tokens / 2) for request in work)
    return {"read": steps * weights + past * config.kv_bytes_per_token(cache_bytes or ELEMENT[dtype])}


def _prefill(work: list[Request]) -> bool:
    return all(request.tokens == 1 for request in work)


def _starting(build: Callable[[], Server] | peers.Missing, work: list[Request]):
    """Builder whose call answers one short request: cold start to the first token."""
    if isinstance(build, peers.Missing):
        return build
    first = [Request(work[0].prompt[:16], 1)]
    return lambda: partial(build(), first)


def _answering(started: Any, work: list[Request], replies: dict[str, list[Reply]], who: str):
    """Call to time: the whole workload on a started server; replies are kept and checked."""
    if isinstance(started, peers.Missing):
        return started

    turn = itertools.count()

    def call() -> None:
        first = next(turn) % FIRST
        answers = started.func([replace(request, prompt=[first, *request.prompt[1:]]) for request in work])
        same = replies.get(who, answers)  # of the first round, in which all contestants got the same prompts
        replies[who] = [replace(reply, times=answer.times) for reply, answer in zip(same, answers)]
        short = [(len(reply.tokens), request.tokens) for reply, request in zip(answers, work)]
        if wrong := [pair for pair in short if pair[0] != pair[1]]:
            raise ValueError(f"returned {wrong[0][0]} tokens where {wrong[0][1]} were asked for")

    return call


def _gaps(reply: Reply) -> list[float]:
    """Inter-token latencies; their mean where only the ends are known."""
    first, last, count = reply.times[0], reply.times[-1], len(reply.tokens)
    if len(reply.times) < count:
        return [(last - first) / (count - 1)]
    return [later - sooner for sooner, later in itertools.pairwise(reply.times)]


def _notes(replies: list[Reply] | None, reference: list[Reply]) -> dict[str, Value]:
    """Latency percentiles, and agreement with our tokens."""
    if not replies:
        return {}
    notes: dict[str, Value] = {}
    timed = [reply for reply in replies if reply.times]
    gaps = [gap for reply in timed if len(reply.tokens) > 1 for gap in _gaps(reply)]
    for name, values in (("ttft", [reply.times[0] for reply in timed]), ("gap", gaps)):
        for percent in (50, 99) if values else ():
            notes[f"{name}_p{percent}_seconds"] = sorted(values)[min(len(values) - 1, len(values) * percent // 100)]
    same = sum(r.text == other.text if r.text else r.tokens == other.tokens for r, other in zip(replies, reference))
    return notes | {"agrees": same / len(replies)}
