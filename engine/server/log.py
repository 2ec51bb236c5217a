"""Non-blocking log: a full disk or an unread pipe drops lines instead of delaying responses.

Written from a thread, through a bounded queue; what does not fit is dropped and counted. Standard error is unbuffered:
a `print` on the event loop once reset finished answers (/dev/full) and froze the server at the 369th request (a pipe).
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from typing import TextIO

LINES = 10_000  # that may wait


class LineWriter:
    """Background thread that writes lines to a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream  # None: standard error, whatever it is when a line is written
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(LINES)
        self._dropped = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Queue a line, or drop it if the queue is full."""
        if self._thread is None:
            self._start()
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self, seconds: float = 2.0) -> None:
        """Wait until queued lines are written, or the time is up."""
        if self._thread is not None:
            written = threading.Event()
            try:
                self._lines.put(written, timeout=seconds)
            except queue.Full:
                return
            written.wait(seconds)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="warploom-log", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            dropped, self._dropped = self._dropped, 0
            lost = f"warploom: {dropped} log lines were lost: standard error was not read\n" if dropped else ""
            stream = self._stream or sys.stderr
            try:
                stream.write(f"{lost}{line}\n")
                stream.flush()
            except (OSError, ValueError):  # full, or closed
                self._dropped += dropped + 1


WRITER = LineWriter()


class LogHandler(logging.Handler):
    """`logging` handler that uses the writer."""

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        WRITER.write(self.format(record))
