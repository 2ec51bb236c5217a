"""Text corpora: documents that can be re-read, their split by hash, and cutting into passages.

Two questions are answered here, before any text is tokenized.

*Which text belongs to which split?* A model must not be judged on text it has seen, so a split is decided by
document: the hash of a document's beginning gives it a *place* in [0, 1), and the splits are intervals of places. The
hash needs no second pass and no list of documents, does not move when documents are added, and sends copies of one
file to the same side. A corpus of a few documents (a novel) is too coarse for that: there, the place of a passage is
how far into its document it lies, so that validation is the novel's end; of a short document, how far into the corpus.

*How does a file larger than memory pass through?* As passages of about a megabyte. They are cut where no tokenizer
would have joined the two sides (a line end before a word), so the tokens of the passages are the tokens of the whole.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import InputError

PASSAGE = 1 << 20  # characters; a corpus of any size passes through memory in pieces of about this
FEW = 100  # below this many documents, each long document is itself cut into splits
LONG = 500  # characters; what is shorter stays whole
SEAMS = [re.compile(seam) for seam in (r"(?<=\n)(?=\w)", r"(?<=\w)(?= \w)", r"(?<=\n)")]


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of one document: `place` in [0, 1) decides its split, `ends` says that its document is complete."""

    text: str
    place: float
    ends: bool


@dataclass(frozen=True, slots=True)
class Corpus:
    """A named source of documents. `read` starts over at each call; a document is an iterator of blocks of text."""

    name: str
    read: Callable[[], Iterator[Iterable[str]]]

    def passages(self) -> Iterator[Passage]:
        """Yield the whole text in order as passages, each with the place that decides its split."""
        lengths = [sum(map(len, blocks)) for blocks in itertools.islice(self.read(), FEW)]
        if not any(lengths):
            raise InputError(f"the corpus {self.name} is empty: there is no text in it")
        if len(lengths) == FEW:
            for blocks in self.read():
                yield from _one_of_many(blocks)
            return
        ends = list(itertools.accumulate(lengths))
        for blocks, length, end in zip(self.read(), lengths, ends):
            if length >= LONG:
                yield from _long_document(blocks, length)
            elif length:
                yield Passage("".join(blocks), (end - length / 2) / ends[-1], True)


def _one_of_many(blocks: Iterable[str]) -> Iterator[Passage]:
    place = None
    for text, ends in _mark_last(cut(blocks, PASSAGE)):
        if place is None:
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
            place = int.from_bytes(digest, "big") / 2**48
        yield Passage(text, place, ends)


def _long_document(blocks: Iterable[str], length: int) -> Iterator[Passage]:
    size = min(PASSAGE, max(LONG // 10, length // 200))
    done = 0
    for text, ends in _mark_last(cut(blocks, size)):
        yield Passage(text, (done + len(text) / 2) / length, ends)
        done += len(text)


def cut(blocks: Iterable[str], size: int) -> Iterator[str]:
    """Re-chunk blocks of text into passages of `size` to 2 `size` characters, cut at a seam where possible."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > 2 * size:
            end = _seam(held, size)
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _seam(text: str, size: int) -> int:
    for seam in SEAMS:
        if found := seam.search(text, size, 2 * size):
            return found.start()
    return size


def _mark_last(items: Iterable[str]) -> Iterator[tuple[str, bool]]:
    items = iter(items)
    for held in items:
        for item in items:
            yield held, False
            held = item
        yield held, True
