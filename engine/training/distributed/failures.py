"""Failure reporting: of several failing processes, only the first one reports its error.

A wrong flag is the same mistake in each of a thousand processes, and when one process fails the others lose it in the
middle of a word. What people need is one sentence: that of the process that failed first. So whoever fails adds one to
a number in the store that torchrun keeps; the process that made it 1 speaks, the others leave quietly, with the same
exit code. torchrun repeats the sentence in its own report, as the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from ....tokenizer.sources import write_text
from ...errors import USER_ERRORS

LOST = ("closed by peer", "reset by peer", "Broken pipe", "pair closure", "remote process exit")


@contextlib.contextmanager
def report_first_failure() -> Iterator[None]:
    """Context in which only the first process to fail raises its error; the others exit silently."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # alone, or started without torchrun
        yield
        return
    try:
        yield
    except Exception as error:
        _not_to_be_interrupted()
        lost = any(sign in str(error) for sign in LOST)
        code = 2 if isinstance(error, USER_ERRORS) and not lost else 1
        if not _is_first():
            sys.exit(code)
        sentence = _of_the_lost() if lost else " ".join(str(error).split())
        _tell_torchrun(sentence)
        if lost:
            print(f"warploom train: {sentence}", file=sys.stderr)
            sys.exit(code)
        raise


def _not_to_be_interrupted() -> None:
    """Ignore SIGTERM while reporting: torchrun terminates all processes once one has died."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_first() -> bool:
    """Return whether this process is the first of its generation to fail; True if the store is gone."""
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
        return store.add(f"failed/{attempt}", 1) == 1
    except Exception:
        return True


def _of_the_lost() -> str:
    me = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    return f"{me} lost another, which was killed or lost its machine; resume goes on from the last checkpoint"


def _tell_torchrun(sentence: str) -> None:
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            write_text(path, json.dumps({"message": message}))  # torchrun fails at half of one
