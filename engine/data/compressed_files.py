"""Guarded readers of Zstandard and xz files: truncation is an error, and xz has a memory limit.

The Zstandard package takes a truncated file for a whole one, and xz allocates whatever dictionary a file asks for.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import IO, BinaryIO

CHUNK = 1 << 16
XZ_MEMORY = 256 << 20  # bytes; `xz -9` asks for 65 MiB, a forged header for 4 GiB
FRAME, SKIPPABLE = 0xFD2FB528, 0x184D2A5


def whole_frames(file: BinaryIO) -> BinaryIO:
    """Check a Zstandard file for truncation: EOFError unless its last frame ends with the file, by the sizes of its
    blocks (RFC 8878, section 3.1). Where other bytes stand, decompression will say so."""
    size, at = file.seek(0, io.SEEK_END), 0
    while at < size:
        magic = _number(file, at, 4)
        if magic >> 4 == SKIPPABLE:
            at += 8 + _number(file, at + 4, 4)
        elif magic == FRAME:
            at = _end_of_frame(file, at)
        else:
            break
    if at > size or not size:
        raise EOFError("it ends before its last frame does" if size else "it is empty")
    file.seek(0)
    return file


def _end_of_frame(file: BinaryIO, at: int) -> int:
    """Offset of the end of the frame that begins at `at`."""
    described = _number(file, at + 4, 1)
    is_single, has_checksum = described >> 5 & 1, described >> 2 & 1
    dictionary, content = (0, 1, 2, 4)[described & 3], (is_single, 2, 4, 8)[described >> 6]
    at += 5 + (not is_single) + dictionary + content
    while True:
        block = _number(file, at, 3)
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # one byte stands for a run
        if block & 1:
            return at + 4 * has_checksum


def _number(file: BinaryIO, at: int, count: int) -> int:
    file.seek(at)
    if len(found := file.read(count)) < count:
        raise EOFError("it ends before its last frame does")
    return int.from_bytes(found, "little")


def open_xz(path: Path, mode: str) -> io.BufferedReader:
    """Open an xz file, of one stream or several, decompressed within `XZ_MEMORY`."""
    return io.BufferedReader(_XzReader(open(path, mode)), CHUNK)


class _XzReader(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, into: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            packed = b""
            if self._stream.eof:
                if not (packed := self._next_stream()):
                    return 0
                self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            elif self._stream.needs_input and not (packed := self._file.read(CHUNK)):
                raise EOFError("it ends before its last stream does")
            if unpacked := self._stream.decompress(packed, len(into)):
                into[: len(unpacked)] = unpacked
                return len(unpacked)

    def _next_stream(self) -> bytes:
        """First bytes of the next stream, behind the zero padding; empty at the end of the file."""
        packed = self._stream.unused_data
        while not (packed := packed.lstrip(b"\0")):
            if not (packed := self._file.read(CHUNK)):
                break
        return packed

    def close(self) -> None:
        self._file.close()
        super().close()
