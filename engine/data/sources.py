"""Named sources of text: the standard library, local files, Hub datasets."""

from __future__ import annotations

import glob
import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import InputError
from .corpus import Corpus
from .hf_datasets import HUB, hub
from .text_files import holds_rows, json_texts, read_rows, text_blocks


def stdlib(limit: int | None = None) -> Corpus:
    """The Python standard library of the running interpreter: real text on every machine, with no download."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def read() -> Iterator[Iterable[str]]:
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        paths = (path.relative_to(root) for path in root.rglob("*.py"))
        paths = sorted((path for path in paths if not skipped & set(path.parts)), key=lambda path: path.parts)
        texts = (_source_text(root / path) for path in paths)
        return ([text] for text in itertools.islice(filter(None, texts), limit))

    return Corpus("stdlib", read)


def _source_text(path: Path) -> str | None:
    """The file as text, or None for tables disguised as code: character maps, escaped bytes, very long lines."""
    try:
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError):
        return None
    lines = text.count("\n") + 1
    letters = sum(character.isalpha() or character.isspace() for character in text[:20_000])
    dense = letters < 0.6 * min(len(text), 20_000) or ("\\x" in text and text.count("\\x") * 50 > len(text))
    foreign = len(text.encode()) > 1.1 * len(text)
    return None if len(text) < 200 or len(text) > 120 * lines or dense or foreign else text


def files(patterns: Iterable[str | Path], field: str = "text", limit: int | None = None) -> Corpus:
    """Local files: `.txt` (and any other text) is one document each, a table (text_files.py) one document a row.

    `patterns` are paths, folders or globs; `field` names the text in a row. A `.json` without it is plain text.
    """
    paths = expand(patterns)

    def read() -> Iterator[Iterable[str]]:
        return itertools.islice((document for path in paths for document in _documents(path, field)), limit)

    return Corpus(str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more", read)


def expand(patterns: Iterable[str | Path]) -> list[Path]:
    """Paths, folders and globs as a sorted list of files."""
    found: dict[Path, None] = {}
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        else:
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not matches and path.is_dir():
            raise InputError(f"{pattern} is a folder without files: give a text file, or a folder of some")
        if not matches:
            raise InputError(
                f"no file matches {pattern!r}: give a text file, a folder, or a glob such as 'texts/*.txt'"
            )
        found.update(dict.fromkeys(matches))
    if not found:
        raise InputError("no files were given: source 'file' needs at least one path or glob in --files")
    return list(found)


def _documents(path: Path, field: str) -> Iterator[Iterable[str]]:
    if holds_rows(path) and (".json" not in path.suffixes or _first_row_has(path, field)):
        return ([text] for text in json_texts(path, field))
    return iter([text_blocks(path)])


def _first_row_has(path: Path, field: str) -> bool:
    return any(isinstance(row, dict) and field in row for _, row in itertools.islice(read_rows(path), 1))


def open_corpus(
    source: str, patterns: Iterable[str | Path] = (), limit: int | None = None, keep: str | Path = "download"
) -> Corpus:
    """The corpus that `warploom data --source … --files … --num-samples …` names; downloads go to the folder `keep`."""
    if source == "stdlib":
        return stdlib(limit)
    if source == "file":
        return files(patterns, limit=limit)
    if source in HUB:
        return hub(source, keep, limit)
    raise InputError(f"source {source!r} is not known; choose one of: stdlib, file, {', '.join(HUB)}")
