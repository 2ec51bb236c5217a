"""Sandbox for model-written Python: a process with limits on time, memory, files, processes, and no network.

The process has an empty environment, a folder of its own that goes away, and on Linux, where the kernel lets a user
have one, a network namespace without a network. That contains accidents (not of root, whose processes the
kernel does not count); code by someone who means harm belongs into a virtual machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile

MEMORY = 2 << 30
FILES = 16 << 20  # bytes of the largest file it may write
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # of unshare(2)


def runs(program: str, seconds: float = 10.0) -> bool:
    """Return whether the program ends by itself, in time and without an error."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", program], cwd=folder, env={}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: _limit(seconds),
        )  # fmt: skip
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.wait()


def _limit(seconds: float) -> None:
    """Set resource limits in the child process."""
    import resource

    whole = int(seconds) + 1
    limits = {resource.RLIMIT_CPU: whole, resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: FILES}
    for kind, most in {**limits, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64}.items():
        resource.setrlimit(kind, (most, most))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)
    resource.setrlimit(resource.RLIMIT_NPROC, (32, 32))
