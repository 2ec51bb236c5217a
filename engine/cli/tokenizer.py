"""`warploom tokenizer train|encode|decode|show`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...tokenizer.sources import size_of
from ..errors import InputError
from .flags import parse
from .progress import progress

USAGE = """usage: warploom tokenizer train|encode|decode|show [flags]

  train   learn a tokenizer from text files and write tokenizer.json
  encode  text to token ids: a line of numbers, or a token file with --out
  decode  token ids to text
  show    what a tokenizer holds; with a text, how the text splits

warploom tokenizer ACTION --help explains the flags."""


@dataclass(frozen=True)
class Train:
    """Train a tokenizer on text files and write OUT/tokenizer.json, which Hugging Face tools open too."""

    corpus: tuple[Path, ...]
    """UTF-8 text files."""
    out: Path
    """Directory to write."""
    kind: Literal["bpe", "char", "word"] = "bpe"
    """bpe = byte pairs; char = a token a character; word = a token a word."""
    vocab_size: int = 8192
    """Tokens in all, special ones included (char takes every character there is)."""
    pattern: str = "gpt4"
    """Pre-tokenization pattern: gpt2, digits, gpt4, qwen2, qwen3.5, o200k, tekken, deepseek, falcon, or your own."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Markers that get ids of their own and are never merged across (bpe, char)."""
    ties: Literal["bytes", "hf", "ids"] = "bytes"
    """Among equally frequent pairs: greatest bytes, Hugging Face's order, or smallest ids."""
    min_frequency: int = 1
    """Pairs or words rarer than this are left out."""
    max_token_length: int | None = None
    """No token gets more bytes than this."""
    lowercase: bool = True
    """Fold case (kind word)."""
    threads: int | None = None
    """Threads that count; None = all cores."""


@dataclass(frozen=True)
class Encode:
    """Print the ids of a text (an argument, or standard input), or write those of a file with --file and --out."""

    tokenizer: Path
    """A directory with tokenizer.json, or such a file."""
    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text; standard input if there is none."""
    file: Path | None = None
    """A text file to encode into --out."""
    out: Path | None = None
    """The token file to write: little-endian uint16, or uint32 for more than 65536 tokens."""
    allow_special: bool = False
    """Recognize special tokens in the text."""
    count: bool = False
    """Print only how many ids there are."""
    threads: int | None = None
    """Threads; None = all cores."""


@dataclass(frozen=True)
class Decode:
    """Print the text of token ids (arguments, standard input, or a token file)."""

    tokenizer: Path
    """A directory with tokenizer.json, or such a file."""
    ids: Annotated[tuple[int, ...], tyro.conf.Positional] = field(default=())
    """The ids; from standard input if there are none."""
    file: Path | None = None
    """A token file that encode --out wrote."""


@dataclass(frozen=True)
class Show:
    """Describe a tokenizer; with a text, show how it is split into tokens."""

    tokenizer: Path
    """A directory with tokenizer.json, or such a file."""
    text: Annotated[str | None, tyro.conf.Positional] = None
    """A text to split."""
    longest: int = 10
    """Longest tokens to list."""


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in ACTIONS:
        raise InputError(f"{argv[0]!r} is not an action; choose one of: {', '.join(ACTIONS)}")
    flags, act = ACTIONS[argv[0]]
    act(parse(flags, argv[1:], f"tokenizer {argv[0]}"))
    return 0


def train(flags: Train) -> None:
    from ...tokenizer import BPETokenizer, CharTokenizer, WordTokenizer

    began, files = time.perf_counter(), list(flags.corpus)
    if not size_of(files):
        raise InputError(f"corpus {', '.join(map(str, files))} is empty: there is no text to train on")
    if flags.kind == "char":
        tokenizer = CharTokenizer.train(files, special_tokens=flags.special_tokens)
    elif flags.kind == "word":
        tokenizer = WordTokenizer.train(files, flags.vocab_size, flags.min_frequency, flags.lowercase)
    else:
        with progress("reading", "merging") as (reading, merging):
            tokenizer = BPETokenizer.train(
                files,
                flags.vocab_size,
                flags.pattern,
                flags.special_tokens,
                flags.threads,
                ties=flags.ties,
                min_frequency=flags.min_frequency,
                max_token_length=flags.max_token_length,
                progress=merging,
                reading=reading,
            )
    tokenizer.save(flags.out)
    size = sum(path.stat().st_size for path in files) / 1e6
    seconds = time.perf_counter() - began
    print(f"wrote {flags.out}: {tokenizer.vocab_size:,} tokens from {size:,.1f} MB in {seconds:.1f} s")


def encode(flags: Encode) -> None:
    tokenizer = _load(flags.tokenizer)
    allowed = "all" if flags.allow_special else "none"
    if (flags.file is None) != (flags.out is None):
        raise InputError("--file and --out go together: the text file to read and the token file to write")
    if flags.file is not None:
        if flags.text is not None:
            raise InputError("give a text or --file, not both")
        began = time.perf_counter()
        with progress("encoding") as (advance,):
            total = tokenizer.encode_file(flags.file, flags.out, flags.threads, allowed, advance)
        size, seconds = flags.file.stat().st_size, time.perf_counter() - began
        rate = f"{size / 1e6 / seconds:.0f} MB/s" if seconds else ""
        print(f"wrote {flags.out}: {total:,} tokens of {size:,} bytes as {tokenizer.dtype}, {rate}")
        return
    text = sys.stdin.read() if flags.text is None else flags.text
    ids = tokenizer.encode_array(text, allowed)
    print(len(ids) if flags.count else " ".join(map(str, ids.tolist())))


def decode(flags: Decode) -> None:
    import numpy as np

    tokenizer = _load(flags.tokenizer)
    if flags.file is not None:
        size, width = flags.file.stat().st_size, tokenizer.dtype.itemsize
        if size % width:
            raise InputError(f"{flags.file} has {size:,} bytes; a token file of this tokenizer has {width} for each id")
        ids = np.fromfile(flags.file, dtype=tokenizer.dtype.newbyteorder("<"))
    else:
        ids = list(flags.ids) or [_whole_number(word) for word in sys.stdin.read().split()]
    stream = tokenizer.stream()
    for token_id in map(int, ids):
        sys.stdout.write(stream.push(token_id))
    sys.stdout.write(stream.finish() + "\n")


def show(flags: Show) -> None:
    tokenizer = _load(flags.tokenizer)
    if flags.text is not None:
        show_tokens(tokenizer, flags.text)
        return
    print(f"{type(tokenizer).__name__} with {tokenizer.vocab_size:,} tokens")
    for name in ("pattern", "normalizer", "lowercase"):
        if getattr(tokenizer, name, None) is not None:
            print(f"  {name:14} {getattr(tokenizer, name)}")
    print(f"  {'special tokens':14} {', '.join(f'{name} = {i}' for name, i in tokenizer.special_tokens.items())}")
    longest = sorted(tokenizer.vocab, key=len, reverse=True)[: flags.longest]
    print(f"  {'longest':14} " + " ".join(repr(_text(token)) for token in longest))


def show_tokens(tokenizer, text: str) -> None:
    """Print the tokens of a text, one a line, with id and the characters covered."""
    ids, spans = tokenizer.encode_with_offsets(text)
    for token_id, (start, end) in zip(ids, spans):
        print(f"{token_id:>8}  {start:>5}-{end:<5} {_text(tokenizer.token_bytes(token_id))!r}")
    size = len(text.encode())
    print(f"{len(ids)} tokens, {len(text)} characters, {size} bytes: {size / max(len(ids), 1):.2f} bytes a token")


def _load(path: Path):
    from ..formats.model_info import open_tokenizer

    return open_tokenizer(path)


def _text(token: str | bytes) -> str:
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else token


def _whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise InputError(f"ids must be whole numbers; {word[:40]!r} is none") from None


ACTIONS = {"train": (Train, train), "encode": (Encode, encode), "decode": (Decode, decode), "show": (Show, show)}
