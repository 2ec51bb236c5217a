"""File input and output: corpora as streams, atomic writes."""

import codecs
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

Corpus = str | Path | Iterable[str | Path]

_CHUNK = 1 << 20


def documents(corpus: Corpus) -> Iterator[str | Path]:
    """Documents of a corpus: a Path is a file, a str is text.

    A corpus is a path, a list of paths, or an iterable of texts. In a list of strings, all of which name existing
    files, the strings are paths; a list in which only some do is refused, because it is more likely a slip.
    """
    if isinstance(corpus, (str, Path)):
        yield existing(corpus)
        return
    if isinstance(corpus, (list, tuple)) and corpus and all(isinstance(item, str) for item in corpus):
        are_files = [_is_file(item) for item in corpus]
        if all(are_files):
            yield from map(Path, corpus)
            return
        if any(are_files):
            missing = str(corpus[are_files.index(False)])
            raise InputError(f"corpus names files, but {missing[:100]!r} is not one")
    for item in corpus:
        if isinstance(item, Path):
            yield existing(item)
        elif isinstance(item, str):
            yield item
        else:
            raise InputError(f"corpus holds a {type(item).__name__}; it must hold texts (str) or paths")


def size_of(corpus: Corpus) -> int:
    """Bytes of a corpus of files; 0 for texts."""
    if not isinstance(corpus, (str, Path, list, tuple)):
        return 0
    return sum(document.stat().st_size for document in documents(corpus) if isinstance(document, Path))


def existing(path: str | Path) -> Path:
    """Check that the path is a file."""
    if not _is_file(path):
        shown = str(path) if len(str(path)) < 100 else str(path)[:100] + "…"
        raise InputError(f"corpus {shown!r} is not a file; pass a path, a list of paths, or an iterable of texts")
    return Path(path)


def _is_file(path: str | Path) -> bool:
    try:
        return len(str(path)) < 4096 and os.path.isfile(path)
    except ValueError:  # a NUL byte
        return False


def read_pieces(path: str | Path, size: int = _CHUNK) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces; newlines stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with open(path, "rb") as file:
        while True:
            data = file.read(size)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = position - held + error.start
                raise InputError(f"{path} is not valid UTF-8 at byte {where}: {error.reason}") from None
            if text:
                yield text
            if not data:
                return
            position += len(data)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file; newlines stay as they are."""
    return "".join(read_pieces(path))


def unfinished(path: str | Path) -> Path:
    """Temporary path of this process for a file or folder that is renamed when complete."""
    path = Path(path)
    return path.parent / f".{path.name}.{os.getpid()}.partial"


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed processes have left: all in a folder, or those of one name.

    For whoever alone writes there. The number in a name tells nothing: those of processes come again.
    """
    for left in folder.glob(".*.partial"):
        if name in (None, left.name[1:].rsplit(".", 2)[0]):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when completely written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(path)
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path, merge: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Staging directory, renamed to `path` when the block succeeds, removed when it fails.

    Where `path` exists already it is replaced whole, or `merge(staging, path)` moves the files over.
    """
    path = Path(path)
    staging = unfinished(path)
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process with the same pid
    staging.mkdir(parents=True)
    try:
        yield staging
        if merge is not None and path.exists():
            merge(staging, path)
        else:
            replace_directory(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_directory(staging: Path, path: Path) -> None:
    """Rename a finished directory to `path`, replacing one that exists."""
    old = unfinished(f"{path}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(staging, path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_writer(path) as file:
        file.write(text.encode())
