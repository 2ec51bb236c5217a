"""`warploom data`: tokenize a corpus to token files."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from .flags import parse
from .progress import progress


@dataclass(frozen=True)
class Flags:
    """Tokenize a corpus into DIR/train.bin, val.bin and test.bin. Only the sources tinystories, openwebtext and
    wikitext use the network: they are downloaded from the Hugging Face hub to DIR.download, which is removed at the
    end; interrupted, the same command goes on."""

    out: str
    """Directory to write."""
    source: Literal["stdlib", "file", "tinystories", "openwebtext", "wikitext"] = "file"
    """stdlib = Python's standard library on this machine; file = --files; the others are public data sets."""
    files: tuple[str, ...] = ()
    """Text files, folders or globs: .txt, .jsonl, JSON arrays, .parquet (field "text"), also .gz, .bz2, .xz, .zst."""
    num_samples: int | None = None
    """Read only the first so many documents."""
    tokenizer: str = "bpe"
    """bpe, char or word (trained on the training split), or a directory or file to load."""
    vocab_size: int = 8192
    """Size of a tokenizer trained here."""
    splits: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test."""
    threads: int | None = None
    """Threads that encode; None = all cores."""


def run(argv: list[str]) -> int:
    flags = parse(Flags, argv, "data")
    from ..data import open_corpus, text_of, write_token_data
    from ..training.inputs import make_tokenizer

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    keep = Path(f"{flags.out}.download")
    corpus = open_corpus(flags.source, flags.files, flags.num_samples, keep)
    if flags.source in ("tinystories", "openwebtext", "wikitext"):
        note(f"downloading {corpus.name} from the Hugging Face hub to {keep}; interrupted, the same command goes on")
    try:
        tokenizer = make_tokenizer(flags.tokenizer, text_of(corpus, 0, flags.splits), flags.vocab_size, note)
        with progress(f"tokenizing {corpus.name}", unit="bytes") as (advance,):
            data = write_token_data(corpus, tokenizer, flags.out, flags.splits, flags.threads, advance)
    except ConnectionError as error:
        raise InputError(f"{error}; the same command goes on where this one stopped") from error
    for name, info in data.meta.splits.items():
        rate = info.bytes / info.tokens if info.tokens else 0
        print(f"{name}: {info.tokens:,} tokens of {info.documents:,} documents, {rate:.2f} bytes a token")
    shutil.rmtree(keep, ignore_errors=True)
    return 0
