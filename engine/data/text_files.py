"""Readers of local text files and tables (JSON lines, JSON, Parquet …), compressed or not.

Text is UTF-8, and a byte order mark at its beginning is dropped. Rows are what a data set has: the lines of `.jsonl`,
the elements of a JSON array (as Alpaca and ShareGPT were published), the rows of `.parquet`. Text may be compressed. No
file is ever whole in memory, but for JSON arrays.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError
from .compressed_files import XZ_MEMORY, open_xz, whole_frames

BLOCK = 1 << 20  # characters
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
MEMORY = {".xz": XZ_MEMORY >> 20, ".zst": 128}  # MiB, the latter by the package
FORMS = "messages, conversations, instruction and output, prompt and completion"
CONTROL = {*range(32), 127} - {*b"\t\n\f\r\x1a\x1b"}  # bytes that no text has


def text_blocks(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks; line ends stay as they are."""
    with _open_text(path) as file:
        while block := file.read(BLOCK):
            if "\0" in block:
                raise InputError(f"{path} is a binary file (it contains zero bytes), not text")
            yield block


def holds_rows(path: Path) -> bool:
    """Return whether a file is a table: JSON lines, Parquet, or a `.json` of an array or of lines of objects."""
    kind = _kind(path)
    if kind == ".json":
        return _is_array(path) or _is_object(_first_line(path))
    return kind in (".jsonl", ".ndjson", ".parquet")


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a table with its place, `path:number`, counted from 1; empty lines are skipped."""
    if _kind(path) == ".parquet":
        rows = _parquet_rows(path)
    elif _is_array(path):
        rows = iter(_array(path))
    else:
        yield from _json_lines(path)
        return
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row


def json_texts(path: Path, field: str) -> Iterator[str]:
    """The texts that rows have in one field."""
    for place, row in read_rows(path):
        if not isinstance(row, dict) or field not in row:
            has = f"it has {', '.join(row) or 'nothing'}" if isinstance(row, dict) else f"it is {json.dumps(row)[:40]}"
            raise InputError(
                f"{place} is not an object with a field {field!r}, nor a conversation ({FORMS}): {has}; rename its "
                "fields to one of these"
            )
        if not isinstance(row[field], str):
            raise InputError(f"{place}: field {field!r} must be a string, not {type(row[field]).__name__}")
        yield row[field]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number} is not a JSON object: {error}") from error
            yield f"{path}:{number}", row


def _array(path: Path) -> list[Any]:
    with _open_text(path) as file:
        try:
            return json.load(file)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise InputError(f"{path} is not a JSON array: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a complete parquet file: {error}") from error


def _first_line(path: Path) -> str:
    with _open_text(path) as file:
        return next((line for line in file if line.strip()), "").lstrip()


def _is_array(path: Path) -> bool:
    return _kind(path) == ".json" and _first_line(path).startswith("[")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _kind(path: Path) -> str:
    """Suffix of a file, under a compression suffix if there is one."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, compressed or not; a file that cannot be read raises one sentence about it."""
    try:
        with _open_bytes(path) as data:
            yield io.TextIOWrapper(data, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is {_what_instead(path)}") from error
    except _damage(path) as error:
        if "memory" in str(error).lower():
            raise InputError(
                f"{path} would take more than {MEMORY[path.suffix]} MiB to unpack: pack it again at an ordinary level"
            ) from error
        raise InputError(f"{path} is not a complete {COMPRESSED[path.suffix]} file: {error}") from error


def _open_bytes(path: Path) -> Any:
    if path.suffix == ".zst":
        decompressor = _zstandard(path).ZstdDecompressor()
        return decompressor.stream_reader(whole_frames(open(path, "rb")), read_across_frames=True)
    if path.suffix in COMPRESSED and path.is_file() and not path.stat().st_size:
        raise EOFError("it is empty")  # which gzip takes for nothing, packed
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": open_xz}.get(path.suffix, open)(path, "rb")


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """Exceptions that a decompressor raises for a damaged file."""
    if path.suffix == ".zst":
        return EOFError, _zstandard(path).ZstdError
    return (EOFError, OSError, lzma.LZMAError, zlib.error) if path.suffix in COMPRESSED else ()


def _zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise InputError(f"{path} needs the package zstandard: pip install zstandard") from error


def _what_instead(path: Path) -> str:
    """Describe a file that is not UTF-8 text: its likely encoding and the command that converts it."""
    with _open_bytes(path) as file:
        encoding = likely_encoding(file.read(4096))
    if encoding is None or path.suffix in COMPRESSED:
        return f"a binary file or not UTF-8 text{f' (perhaps {encoding})' if encoding else ''}"
    made = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"not UTF-8 text, perhaps {encoding}: convert it, iconv -f {encoding} -t UTF-8 '{path}' > '{made}'"


def likely_encoding(head: bytes) -> str | None:
    """Guess the encoding, other than UTF-8, of a text that begins so; None for a binary file."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if CONTROL & {*head}:
        return None
    try:
        read = codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in read)
    return "GB18030" if chinese > len(read) / 4 else "WINDOWS-1252"
