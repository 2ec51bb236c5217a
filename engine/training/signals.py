"""Graceful shutdown: the first SIGINT or SIGTERM ends the run after this step with a checkpoint; a second SIGINT raises
KeyboardInterrupt.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def interruptible(stop: Callable[[str], None]) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM call `stop` with the signal's name; a second SIGINT raises KeyboardInterrupt.

    Only the main thread may catch signals; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        stop(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
