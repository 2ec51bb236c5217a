"""Token files: a split is one flat array of token ids on disk, `train.bin`, which training maps into memory.

A file has no header (uint16 or uint32, little-endian, as other small trainers write it too); `meta.json` beside it
says what the ids mean, and `train.starts` (int64) where each document begins. Writing takes constant memory: passages
arrive, are encoded a few megabytes at a time on all cores, and are appended. The directory appears by rename, complete
or not at all, together with the tokenizer that made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...tokenizer.sources import atomic_directory
from ..errors import InputError
from .corpus import Corpus, Passage

SPLITS = ("train", "val", "test")
BATCH = 4 << 20  # characters encoded at a time
END = "<|endoftext|>"


@dataclass(frozen=True)
class SplitInfo:
    """Size and hash of one split of a dataset."""

    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of its text: what bits per byte are measured against."""
    sha256: str
    learned: int | None = None
    """Tokens that are targets, as `train.learn` says; None: all, and there is no such file."""


@dataclass(frozen=True)
class Meta:
    """`meta.json`: everything a reader needs to know about the token files beside it."""

    source: str
    dtype: str
    vocab_size: int
    end_of_document: int | None
    """Token written after each document, if the tokenizer has one."""
    tokenizer_sha256: str
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    format: int = 1
    pairs: bool = False
    """Documents are preference pairs: a chosen answer, then the rejected one."""


@dataclass(frozen=True)
class TokenSplit:
    """One memory-mapped split: `tokens`, `starts` of the documents, and the loss mask `learn`."""

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    bytes: int
    sha256: str = ""
    learn: np.ndarray | None = None
    """A byte a token: whether it is a target. None: all are."""

    def __len__(self) -> int:
        return len(self.tokens)


class TokenData:
    """A directory of token files, as `warploom data` writes it."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "meta.json"
        try:
            raw = json.loads(path.read_text())
            splits = {name: SplitInfo(**info) for name, info in raw.pop("splits").items()}
            self.meta = Meta(**raw, splits=splits)
        except FileNotFoundError as error:
            raise InputError(f"{self.directory} is no token directory: it has no meta.json") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}") from error

    def split(self, name: str) -> TokenSplit:
        """The tokens of 'train', 'val' or 'test'."""
        if name not in self.meta.splits:
            raise InputError(f"split {name!r} is not in {self.directory}; it has: {', '.join(self.meta.splits)}")
        info = self.meta.splits[name]
        path = self.directory / f"{name}.bin"
        dtype = np.dtype(self.meta.dtype)
        if not path.is_file() or path.stat().st_size != info.tokens * dtype.itemsize:
            raise InputError(f"{path} is missing or truncated: meta.json promises {info.tokens} tokens of {dtype}")
        tokens = np.memmap(path, dtype, "r") if info.tokens else np.empty(0, dtype)
        starts = np.fromfile(self.directory / f"{name}.starts", np.int64)
        return TokenSplit(name, tokens, starts, info.bytes, info.sha256, self._learn(name, info))

    def _learn(self, name: str, info: SplitInfo) -> np.ndarray | None:
        if info.learned is None:
            return None
        path = self.directory / f"{name}.learn"
        if not path.is_file() or path.stat().st_size != info.tokens:
            raise InputError(
                f"{path} is missing or truncated: meta.json promises a byte for each of {info.tokens} tokens"
            )
        return np.memmap(path, np.uint8, "r") if info.tokens else np.empty(0, np.uint8)

    def tokenizer(self) -> Any:
        """Load the tokenizer that made these tokens."""
        from ...tokenizer import load_tokenizer

        return load_tokenizer(self.directory)


def write_token_data(
    corpus: Corpus,
    tokenizer: Any,
    out: str | Path,
    splits: Sequence[float] = (0.8, 0.1, 0.1),
    threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TokenData:
    """Tokenize a corpus into `out`/{train,val,test}.bin. `on_progress` is called with the bytes read so far."""
    edges = split_edges(splits)
    out = Path(out)
    with directory_for(out) as scratch:
        tokenizer.save(scratch)
        vocab_size = tokenizer.vocab_size
        dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        end = getattr(tokenizer, "special_tokens", {}).get(END)
        writers = [SplitWriter(scratch / name, dtype, end) for name in SPLITS]
        read = 0
        for index, group in _groups(corpus.passages(), edges):
            ids, offsets = _encode([passage.text for passage in group], tokenizer, threads)
            for passage, begin, stop in zip(group, offsets[:-1], offsets[1:]):
                size = len(passage.text.encode("utf-8", "surrogatepass"))
                writers[index].add(ids[begin:stop], passage.ends, size)
                read += size
            if on_progress:
                on_progress(read)
        meta = Meta(
            source=corpus.name,
            dtype=dtype,
            vocab_size=vocab_size,
            end_of_document=end,
            tokenizer_sha256=file_hash(scratch / "tokenizer.json"),
            splits={name: writer.close() for name, writer in zip(SPLITS, writers)},
        )
        (scratch / "meta.json").write_text(json.dumps(asdict(meta), indent=2))
    return TokenData(out)


def split_edges(splits: Sequence[float]) -> np.ndarray:
    """Boundaries of the splits in [0, 1): (0.8, 0.1, 0.1) → [0.8, 0.9]."""
    parts = np.asarray(splits, dtype=float)
    if len(parts) not in (1, 2, 3) or (parts < 0).any() or parts[0] == 0 or not np.isclose(parts.sum(), 1):
        raise InputError(f"splits must be one to three shares (train, val, test) that sum to 1, not {list(splits)}")
    return np.cumsum(parts)[:-1]


def text_of(corpus: Corpus, split: int = 0, splits: Sequence[float] = (0.8, 0.1, 0.1)) -> Iterator[str]:
    """Text of one split alone: a tokenizer may only be trained on the training split."""
    edges = split_edges(splits)
    return (passage.text for passage in corpus.passages() if _index(passage, edges) == split)


def _index(passage: Passage, edges: np.ndarray) -> int:
    return int(np.searchsorted(edges, passage.place, side="right"))


def _groups(passages: Iterator[Passage], edges: np.ndarray) -> Iterator[tuple[int, list[Passage]]]:
    """Group passages of the same split until a group keeps all cores busy; the order within a split is kept."""
    waiting: list[list[Passage]] = [[] for _ in range(len(edges) + 1)]
    sizes = [0] * len(waiting)
    for passage in passages:
        index = _index(passage, edges)
        waiting[index].append(passage)
        sizes[index] += len(passage.text)
        if sizes[index] >= BATCH:
            yield index, waiting[index]
            waiting[index], sizes[index] = [], 0
    yield from ((index, group) for index, group in enumerate(waiting) if group)


def _encode(texts: list[str], tokenizer: Any, threads: int | None) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(tokenizer, "encode_batch_array"):
        return tokenizer.encode_batch_array(texts, threads=threads)
    pieces = [np.asarray(tokenizer.encode(text), dtype=np.uint32) for text in texts]
    return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])


class SplitWriter:
    """Writer of one split's files, hashing as it appends; with `learn`, also of the loss mask."""

    def __init__(self, stem: Path, dtype: str, end: int | None, learn: bool = False) -> None:
        self.file = open(stem.with_suffix(".bin"), "wb")  # noqa: SIM115
        self.starts_file = open(stem.with_suffix(".starts"), "wb")  # noqa: SIM115
        self.learn_file = open(stem.with_suffix(".learn"), "wb") if learn else None  # noqa: SIM115
        self.learned = 0
        self.dtype, self.hash = dtype, hashlib.sha256()
        self.end = np.array([] if end is None else [end], dtype)
        self.tokens = self.documents = self.bytes = 0
        self.between = True

    def add(self, ids: np.ndarray, ends: bool, size: int, learned: np.ndarray | None = None) -> None:
        if self.between:
            self.starts_file.write(np.int64(self.tokens).tobytes())
            self.documents += 1
        for part in (ids.astype(self.dtype, copy=False), self.end if ends else self.end[:0]):
            raw = part.tobytes()
            self.file.write(raw)
            self.hash.update(raw)
            self.tokens += len(part)
        if learned is not None and self.learn_file is not None:
            self.learn_file.write(learned.tobytes())
            self.hash.update(learned.tobytes())
            self.learned += int(learned.sum())
        self.bytes += size
        self.between = ends

    def close(self) -> SplitInfo:
        self.file.close()
        self.starts_file.close()
        if self.learn_file is not None:
            self.learn_file.close()
        learned = None if self.learn_file is None else self.learned
        return SplitInfo(self.tokens, self.documents, self.bytes, self.hash.hexdigest(), learned)


@contextmanager
def directory_for(out: Path) -> Iterator[Path]:
    """Staging directory beside `out`: renamed to it when the block succeeds, removed when it fails."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; token files are written to a directory")
    if out.exists() and any(out.iterdir()) and not (out / "meta.json").is_file():
        raise InputError(f"{out} exists and is no token directory: give an --out that is new or empty")
    with atomic_directory(out) as scratch:
        yield scratch


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
