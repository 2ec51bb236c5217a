"""Bindings of the C++ tokenizer extension: loading, vocabularies, corpora.

`WARPLOOM_NATIVE=0` in the environment, or an extension that was not built, leaves the pure-Python twin.
"""

import os
import warnings
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from .byte_alphabet import HF_ORDER
from .errors import InputError
from .metaspace import Metaspace, bytes_of, character_merges
from .patterns import Pattern, pattern_name, split
from .reference import Merges, Progress, WordCounts, count_words
from .sources import Corpus, documents, size_of

_BLOCK = 2 << 20  # of a file, for each thread
_NO_TOKEN = 0xFFFFFFFF  # of a byte that is dropped


def extension() -> ModuleType | None:
    """The module `warploom._tokenizer`, or None where reference.py is used instead."""
    if os.environ.get("WARPLOOM_NATIVE") == "0":
        return None
    try:
        from .. import _tokenizer
    except ImportError as error:
        warnings.warn(
            f"warploom's C++ tokenizer is missing ({error}): its Python twin is some hundred times slower. "
            "`warploom doctor` says how to get it; WARPLOOM_NATIVE=0 says that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _tokenizer


def build_encoder(
    native: ModuleType,
    vocab: dict[bytes, int],
    merges: Merges,
    pattern: Pattern,
    whole_words: bool,
    metaspace: Metaspace | None,
    wide: bool,
) -> Any:
    """Build a native encoder; without a scanner for the pattern only `encode_pieces` may be used.

    wide: ids are uint32 instead of uint16.
    """
    byte_ids = bytes_of(vocab, metaspace)
    first_fragment = 1 + max(*vocab.values(), *(token_id for token_id in byte_ids if token_id is not None))
    triples = character_merges(vocab, byte_ids, first_fragment) if metaspace else []
    triples += [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
    left, right, merged = zip(*triples) if triples else ((), (), ())
    return (native.BPE32 if wide else native.BPE16)(
        [_NO_TOKEN if token_id is None else token_id for token_id in byte_ids],
        left,
        right,
        merged,
        pattern_name(pattern) or "gpt4",
        list(vocab.items()) if whole_words else [],
        first_fragment,
        native.Metaspace(metaspace.prefix, metaspace.if_missing) if metaspace else native.Metaspace(),
    )


def build_decoder(native: ModuleType, every: dict[int, bytes]) -> Any:
    """Build a native decoder from the bytes of each id."""
    return native.Decoder(list(every.items()))


def byte_ends(text: str, pattern: Pattern) -> list[int]:
    """Ends of a text's pretokenizer pieces, as UTF-8 byte offsets."""
    pieces = split(text, pattern)
    return list(accumulate(map(len, pieces if text.isascii() else map(str.encode, pieces))))


def file_blocks(
    native: ModuleType, path: str | Path, specials: Any, pattern: Pattern, threads: int
) -> Iterator[tuple[memoryview, Any]]:
    """Split a UTF-8 file into blocks that can be encoded one by one, each with what it follows (`native.Follows`).

    A block is valid until the next one is asked for.
    """
    follows = native.Follows.start
    buffer = bytearray(_BLOCK * threads)
    held = done = 0
    with open(path, "rb", buffering=0) as file:
        while True:
            if held == len(buffer):  # no place to cut in all of it: look at twice as much
                buffer = buffer + bytearray(len(buffer))
            got = file.readinto(memoryview(buffer)[held:])
            held += got
            view = memoryview(buffer)[:held]
            cut, behind = native.stream_cut(view, specials, pattern_name(pattern)) if got else (held, None)
            if not cut and got:
                continue
            invalid = native.first_invalid_utf8(view[:cut])
            if invalid < cut:
                raise InputError(f"{path} is not valid UTF-8 at byte {done + invalid}")
            if cut:
                yield view[:cut], follows
                follows = behind
            if not got:
                return
            buffer[: held - cut] = view[cut:]
            held, done = held - cut, done + cut


def train_merges(
    native: ModuleType,
    corpus: Corpus,
    pattern: Pattern,
    specials: list[str],
    threads: int,
    num_merges: int,
    ties: str,
    min_frequency: int,
    max_token_length: int | None,
    progress: Progress | None,
    reading: Progress | None = None,
) -> Merges:
    """Native version of `reference.train_merges`."""
    name, done, total = pattern_name(pattern), 0, size_of(corpus) if reading else 0
    counter = native.WordCounter(name or "gpt4", threads)
    finder = native.Specials([(token.encode(), 0, False, False) for token in specials]) if specials else None
    if name:
        for document in documents(corpus):
            is_file = isinstance(document, Path)
            blocks = file_blocks(native, document, finder, pattern, threads) if is_file else [(document, None)]
            for block, _ in blocks:
                counter.add(block, finder)
                done += len(block)
                if reading:
                    reading(done, total)
    else:
        counts: WordCounts = count_words(corpus, pattern, specials, reading)
        counter.add_words(list(counts.items()))
    learned = counter.train(num_merges, ties, min_frequency, max_token_length or 1 << 62, HF_ORDER, progress)
    halves = iter(memoryview(learned))
    tokens = [bytes([byte]) for byte in range(256)]
    merges = []
    for left, right in zip(halves, halves):
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return merges
