"""Thread pool with a bounded queue per client, served round robin: fair queueing for work that cannot be interrupted.

One client that sends a hundred slow texts waits for its own hundred; the next client waits for the call under way. A
call whose future is cancelled before it starts never runs. The threads are daemons: a call that never ends keeps one
thread, and keeps the process from exiting for `LAST_CALL` seconds only. Without these, Python would end while a thread
is in C++ or Rust, which takes the process down.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

LAST_CALL = 5.0


class PoolFull(Exception):
    """The client, or all clients together, have too many calls waiting."""


class FairPool:
    """`threads` threads that run submitted calls, at most `waiting` of which may wait."""

    def __init__(self, threads: int, waiting: int = 512, name: str = "warploom-pool") -> None:
        self._queues: OrderedDict[Hashable, deque] = OrderedDict()  # those with something to do, next client first
        self._most, self._count = waiting, 0
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._leave)

    def submit(self, client: Hashable, work: Callable[..., Any], *arguments: Any) -> Future:
        """Queue a call for a client; raises PoolFull beyond the limit."""
        future: Future = Future()
        with self._changed:
            if self._closed or self._count >= self._most:
                raise PoolFull
            self._count += 1
            self._queues.setdefault(client, deque()).append((future, work, arguments))
            self._changed.notify()
        return future

    def shutdown(self) -> None:
        """Cancel queued calls; threads end after their current call."""
        with self._changed:
            self._closed = True
            waiting = [future for queue in self._queues.values() for future, _, _ in queue]
            self._queues.clear()
            self._count = 0
            self._changed.notify_all()
        for future in waiting:
            future.cancel()

    def _leave(self) -> None:
        self.shutdown()
        end = time.monotonic() + LAST_CALL
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while call := self._next():
            future, work, arguments = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del call, future, work, arguments  # an idle thread holds on to no request

    def _next(self) -> tuple | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queues or self._closed)
            if not self._queues:
                return None
            client, queue = self._queues.popitem(last=False)
            call = queue.popleft()
            self._count -= 1
            if queue:
                self._queues[client] = queue  # at the end: everybody else comes first
            return call
