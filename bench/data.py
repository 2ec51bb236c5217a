"""Tokenization benchmark: text to token files, in constant memory on all cores.

The text is the standard library over and over: a stream of any length that no disk has to hold. Each size is tokenized
by a process of its own, whose peak memory the operating system tells; were anything kept, ten times the text would
show in it. Seconds include reading, splitting, encoding, hashing and writing.
"""

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from .harness import Machine, Options, Part
from .schema import Row, Spread

ROOMS = ("engine/data", "tokenizer", "csrc")
VOCABULARY = 8192


def parts(options: Options) -> list[Part]:
    """A gigabyte, a tenth of it, and one thread."""
    return [Part("tokenize 1 GB", tokenize, {"megabytes": 1000}, minutes=3)]


def tokenize(machine: Machine, megabytes: int) -> list[Row]:
    """Throughput and peak memory over sizes and threads."""
    rows = []
    with TemporaryDirectory() as folder:
        for size, threads in ((megabytes // 10, 1), (megabytes // 10, None), (megabytes, None)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, tokens, peak = pool.apply(_write, (folder, size * 10**6, threads))
            rows.append(
                Row(
                    f"{size} MB", "ours" if threads is None else "ours, one thread", Spread.of([seconds]),
                    size * 10**6 / seconds, "B", extra={"tokens": tokens, "peak_bytes": peak},
                )
            )  # fmt: skip
    return rows


def _write(folder: str, size: int, threads: int | None) -> tuple[float, int, int]:
    """Tokenize a corpus of `size` bytes; return seconds, tokens and the process's peak memory."""
    import resource

    from ..engine.data.corpus import Corpus
    from ..engine.data.sources import stdlib
    from ..engine.data.tokens import write_token_data
    from ..tokenizer import BPETokenizer

    texts = ["".join(blocks) for blocks in stdlib().read()]
    tokenizer = BPETokenizer.train(texts[:200], vocab_size=VOCABULARY)

    def read() -> Iterator[list[str]]:
        sent = 0
        for text in itertools.cycle(texts):
            if sent >= size:
                return
            sent += len(text.encode())
            yield [text]

    begin = time.perf_counter()
    data = write_token_data(Corpus("stdlib, over and over", read), tokenizer, Path(folder, "data"), threads=threads)
    seconds = time.perf_counter() - begin
    tokens = sum(split.tokens for split in data.meta.splits.values())
    return seconds, tokens, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
