"""Tokenizer benchmark: encoding, decoding and training beside every installable tokenizer.

All contestants get the same merges (GPT-2's, where --gpt2 or WARPLOOM_GPT2 names a folder with `vocab.json` and
`merges.txt`; else ones trained here) and the same texts: this Python's own sources, and each `*.txt` of --texts.
`one thread` cases are measured in CPU seconds, so that a peer that starts threads of its own gains nothing by it; the
others by the clock on the wall. `first_seconds` is the first call of a fresh tokenizer, its caches cold; `load_seconds`
what making it took. `exact` says whether a peer's ids equal ours, which tests compare with tiktoken and tokenizers.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ..engine.memory import PeakMemory
from ..tokenizer import PATTERNS, BPETokenizer
from . import peers
from .harness import Machine, Part
from .harness import Options as Common
from .schema import Row
from .timing import WallTimer

ROOMS = ("tokenizer", "csrc")
DEVICE = "cpu"


@dataclass(frozen=True)
class Options(Common):
    """Options of `warploom bench tokenizer`."""

    gpt2: str = field(
        default=os.environ.get("WARPLOOM_GPT2", ""), metadata={"help": "folder of GPT-2's vocab.json and merges.txt"}
    )
    texts: str = field(default="", metadata={"help": "folder of further texts to measure, each a UTF-8 *.txt"})
    megabytes: float = field(default=8.0, metadata={"help": "how much of each text is encoded"})


@dataclass(frozen=True)
class Work:
    """Inputs of every contestant."""

    tokenizer: BPETokenizer
    directory: Path
    """Holds tokenizer.json and ranks.tiktoken."""
    text: str
    documents: list[str]
    threads: int = 1

    @property
    def json(self) -> Path:
        return self.directory / "tokenizer.json"

    @property
    def ranks(self) -> Path:
        return self.directory / "ranks.tiktoken"

    @property
    def pattern(self) -> str:
        return PATTERNS[self.tokenizer.pattern]

    def fresh(self) -> BPETokenizer:
        """Our tokenizer with cold caches."""
        ours = self.tokenizer
        return BPETokenizer(ours.vocab, ours.merges, ours.special_tokens, ours.pattern)


def parts(options: Options) -> list[Part]:
    """Encoding first; what takes minutes last."""
    texts = (
        ["python", *sorted(path.stem for path in Path(options.texts).glob("*.txt"))] if options.texts else ["python"]
    )
    merges = {"merges": "gpt2" if options.gpt2 else "own", "megabytes": options.megabytes}
    whole = [
        Part(f"{task} {text}", partial(encode, options, task), {"text": text, **merges}, minutes=0.6)
        for task in ("arrays", "lists", "documents", "two threads")
        for text in texts
    ]
    return [
        *whole,
        Part("small", partial(small, options), merges, minutes=0.2),
        Part("decode", partial(decode, options), {"text": "python", **merges}, minutes=0.3),
        Part("adversarial", partial(adversarial, options), merges, minutes=1),
        *(Part(f"train {text}", partial(train, options), {"text": text}, minutes=2) for text in texts),
        Part("gigabyte", partial(gigabyte, options), merges, minutes=2),
    ]


# -- texts and merges -------------------------------------------------------------------------------------------------


def text_of(options: Options, name: str, megabytes: float) -> str:
    """First megabytes of a text."""
    size = int(megabytes * 1e6)
    if name != "python":
        return (Path(options.texts) / f"{name}.txt").read_bytes()[:size].decode("utf-8", "ignore")
    sources, length = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            sources.append(path.read_bytes().decode("utf-8", "ignore"))
            length += len(sources[-1])
        if length >= size:
            break
    return "".join(sources).encode()[:size].decode("utf-8", "ignore")


def work_of(options: Options, text: str, threads: int = 1) -> Work:
    """Merges in every format, and the text, whole and as documents of a kilobyte."""
    if options.gpt2:
        folder = Path(options.gpt2)
        tokenizer = BPETokenizer.from_gpt2_files(folder / "vocab.json", folder / "merges.txt")
    else:
        tokenizer = BPETokenizer.train([text_of(options, "python", 20)], 32_000, "gpt2")
    directory = Path(tempfile.mkdtemp(prefix="warploom-bench-"))
    tokenizer.save(directory)
    tokenizer.to_tiktoken(directory / "ranks.tiktoken")
    documents = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    work = Work(tokenizer, directory, text, documents, threads)
    weakref.finalize(work, shutil.rmtree, directory, ignore_errors=True)
    return work


def one_thread(machine: Machine) -> Machine:
    """Machine that measures CPU seconds."""
    return Machine("cpu", WallTimer(time.process_time), rounds=machine.rounds, seconds=machine.seconds)


def compared(
    machine: Machine, case: str, builders: peers.Builders, amount: float, unit: str, same: Callable | None = None
) -> list[Row]:
    """Compare contestants, with cold first calls and memory as columns; `same` checks results against ours."""
    calls, extra = prepared(machine, builders)
    if same is not None:
        ours = calls["ours"]()
        for who in extra:
            extra[who]["exact"] = bool(same(calls[who](), ours))
    return machine.compare(case, calls, amount=amount, unit=unit, extra=extra)


def prepared(machine: Machine, builders: peers.Builders) -> tuple[peers.Contestants, dict[str, dict]]:
    """Build each contestant and call it once; record loading time, first-call time and memory."""
    calls: peers.Contestants = {}
    extra: dict[str, dict] = {}
    clock = machine.timer.clock
    for who, build in builders.items():
        calls[who] = build
        if isinstance(build, peers.Missing):
            continue
        try:
            begin = clock()
            calls[who] = build()
            loaded = clock()
            with PeakMemory("cpu") as peak:  # which first collects garbage: not part of the call
                begun = clock()
                calls[who]()
                done = clock()
        except Exception as error:
            if who == "ours":
                raise
            calls[who] = peers.Missing(peers.failure(error))
            continue
        extra[who] = {"load_seconds": loaded - begin, "first_seconds": done - begun, "peak_bytes": peak.bytes}
    return calls, extra


def same_ids(theirs: object, ours: object) -> bool:
    """Return whether two results have the same ids, as arrays or lists, whole or per document."""
    return np.array_equal(_flat(theirs), _flat(ours))


def _flat(ids: object) -> np.ndarray:
    if isinstance(ids, tuple):
        ids = ids[0]
    if isinstance(ids, bytes):
        return np.frombuffer(ids, dtype="<u4")
    if isinstance(ids, np.ndarray):
        return ids
    ids = list(ids)
    if ids and hasattr(ids[0], "ids"):
        ids = [encoding.ids for encoding in ids]
    if ids and not isinstance(ids[0], (int, np.integer)):
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in ids])
    return np.asarray(ids, dtype=np.int64)


# -- parts ------------------------------------------------------------------------------------------------------------


def encode(options: Options, task: str, machine: Machine, text: str, megabytes: float, merges: str) -> list[Row]:
    """One large text to an array or list, on one thread or two; or as documents of a kilobyte."""
    threads = 2 if task == "two threads" else 1
    work = work_of(options, text_of(options, text, megabytes), threads)
    size = len(work.text.encode())
    measure = machine if threads > 1 else one_thread(machine)

    def ours() -> Callable[[], object]:
        tok = work.fresh()
        if task == "lists":
            return lambda: tok.encode(work.text)
        if task == "documents":
            return lambda: tok.encode_batch_array(work.documents, threads=1)
        return lambda: tok.encode_array(work.text, threads=threads)

    name = {"arrays": "encode_array", "lists": "encode_list", "documents": "encode_documents"}.get(task, "encode_array")
    case = f"{text}, {size / 1e6:.0f} MB, " + {"documents": "1 KB documents", "two threads": "2 threads"}.get(
        task, task
    )
    rows = compared(measure, case, {"ours": ours} | peers.build(name, work), size, "B", same_ids)
    if task != "two threads":
        return rows
    tok = work.fresh()
    batch = {
        "ours": lambda: lambda: tok.encode_batch_array(work.documents, threads=2),
        "ours, 1 thread": lambda: lambda: tok.encode_batch_array(work.documents, threads=1),
    }
    single = {"ours": ours, "ours, 1 thread": lambda: lambda: tok.encode_array(work.text, threads=1)}
    rows += compared(machine, f"{text}, 1 or 2 threads", single, size, "B")
    rows += compared(machine, f"{text}, 1 KB documents, 1 or 2 threads", batch, size, "B")
    return rows + python_threads(machine, text, tok, work.text.encode())


def python_threads(machine: Machine, name: str, tok: BPETokenizer, text: bytes) -> list[Row]:
    """Eight Python threads that encode a megabyte at a time, or hash it, for the parallelism available."""
    pieces = [text[start : start + 1_000_000] for start in range(0, len(text), 1_000_000)] * 4
    rows = []
    with ThreadPoolExecutor(8) as pool:
        for who, call in {"ours": partial(tok.encode_array, threads=1), "blake2b": hashlib.blake2b}.items():
            ways = {who: partial(_all, pool.map, call, pieces), f"{who}, 1 thread": partial(_all, map, call, pieces)}
            case = f"{name}, 1 MB pieces, 1 or 8 Python threads"
            rows += machine.compare(case, ways, amount=sum(map(len, pieces)), unit="B", ours=who)
    return rows


def _all(mapped: Callable, call: Callable, pieces: list[bytes]) -> None:
    for _ in mapped(call, pieces):
        pass


def small(options: Options, machine: Machine, merges: str, megabytes: float) -> list[Row]:
    """One short call, as a server makes many."""
    work = work_of(options, "The quick brown fox jumps ov")
    tok = work.fresh()
    builders = {"ours": lambda: lambda: tok.encode(work.text)} | peers.build("encode_list", work)
    return compared(machine, "28 bytes to a list", builders, 1, "call", same_ids)


def decode(options: Options, machine: Machine, text: str, megabytes: float, merges: str) -> list[Row]:
    """Ids back to bytes."""
    work = work_of(options, text_of(options, text, megabytes))
    ids = work.tokenizer.encode_array(work.text)
    builders = {"ours": lambda: lambda: work.tokenizer.decode_bytes(ids)} | peers.build("decode", work, ids)
    size = len(work.text.encode())
    return compared(one_thread(machine), f"{text}, {size / 1e6:.0f} MB", builders, size, "B", lambda a, b: a == b)


def adversarial(options: Options, machine: Machine, merges: str, megabytes: float) -> list[Row]:
    """A megabyte without a break: quadratic encoders take minutes, and backtracking patterns crash."""
    draw = random.Random(0)
    texts = {
        "one letter": "a" * 1_000_000,
        "random letters": "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)),
        "digits": "".join(draw.choices("0123456789", k=1_000_000)),
        "spaces": " " * 1_000_000,
        "ideographs": "".join(chr(draw.randrange(0x4E00, 0x9FA0)) for _ in range(333_333)),
    }
    rows = []
    for name, text in texts.items():
        work = work_of(options, text)
        builders = {"ours": partial(_ours_array, work)} | peers.build("encode_array", work)
        rows += compared(one_thread(machine), f"1 MB of {name}", builders, len(text.encode()), "B", same_ids)
    return rows


def _ours_array(work: Work) -> Callable[[], object]:
    tok = work.fresh()
    return lambda: tok.encode_array(work.text, threads=1)


def train(options: Options, machine: Machine, text: str) -> list[Row]:
    """Train vocabularies of 1k, 10k and 32k from one text, in CPU seconds."""
    rows = []
    corpus = text_of(options, text, 32)
    size = len(corpus.encode())
    measure = Machine("cpu", WallTimer(time.process_time), rounds=3)
    with tempfile.TemporaryDirectory() as folder:
        path, little = Path(folder) / "corpus.txt", Path(folder) / "little.txt"
        path.write_bytes(corpus.encode())
        little.write_text("What a library loads on first use is not part of what it takes.\n" * 50)
        prepared(measure, _trainers(little, 300))
        for vocab_size in (1_000, 10_000, 32_000):
            calls, extra = prepared(measure, _trainers(path, vocab_size))
            samples: dict[str, list[float] | peers.Missing] = {}
            for who, call in calls.items():
                if isinstance(call, peers.Missing):
                    samples[who] = call
                else:
                    first = extra[who].pop("first_seconds")
                    samples[who] = [first] if first > 1 else [measure.timer.sample(call, 1) for _ in range(3)]
            case = f"{text}, {size / 1e6:.0f} MB, vocabulary {vocab_size}"
            rows += measure.rows(case, samples, amount=size, unit="B", extra=extra)
    return rows


def _trainers(path: Path, vocab_size: int) -> peers.Builders:
    """Training functions of all contestants."""
    ours = partial(BPETokenizer.train, path, vocab_size, "gpt4", (), 1, ties="hf")
    return {"ours": lambda: ours} | peers.build("train_tokenizer", path, vocab_size, PATTERNS["gpt4"])


def gigabyte(options: Options, machine: Machine, merges: str, megabytes: float) -> list[Row]:
    """Memory and time to train on, and to encode, a file of a gigabyte, in processes of their own."""
    rows = []
    for task in ("train", "encode_file"):
        done = _alone(options, task)
        samples = {"ours": [done["seconds"]]}
        extra = {"ours": {"peak_bytes": done["peak_bytes"], "resident_bytes": done["resident_bytes"]}}
        rows += machine.rows(f"1 GB, {task}", samples, amount=done["bytes"], unit="B", extra=extra)
    return rows


def _alone(options: Options, task: str) -> dict:
    """Run one gigabyte task in a fresh process; its time and memory."""
    import subprocess

    code = f"from {__name__} import gigabyte_task; gigabyte_task({task!r}, {options.gpt2!r}, {options.texts!r})"
    path = os.pathsep.join([str(Path(__file__).absolute().parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def gigabyte_task(task: str, gpt2: str, texts: str) -> None:
    """Make a file of a gigabyte, train on it or encode it; print time and memory as JSON."""
    import resource

    options = Options(gpt2=gpt2, texts=texts)
    text = text_of(options, "python", 8).encode()
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "text", 0
        with open(path, "wb") as file:
            while size < 1_000_000_000:
                size += file.write(text)
        tokenizer = work_of(options, "x").tokenizer
        begin = time.perf_counter()
        with PeakMemory("cpu") as peak:
            if task == "train":
                BPETokenizer.train(path, 32_000)
            else:
                tokenizer.encode_file(path, Path(folder) / "ids")
        seconds = time.perf_counter() - begin
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "bytes": size, "peak_bytes": peak.bytes, "resident_bytes": resident}))
