"""Kernels are compiled for absent GPUs in a process of its own (without the interpreter), beside the other tests."""

import os
import subprocess
import sys

import pytest

PROGRAM = [sys.executable, "-m", "warploom.kernels.offline"]


@pytest.fixture(scope="session", autouse=True)
def surveys(tmp_path_factory):
    """Two running processes, the large cases and the small ones, and the files they write to."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    started = {}
    for name, arguments in (("large", []), ("small", ["--small", "--arch", "90"])):
        path = tmp_path_factory.mktemp("offline") / f"{name}.txt"
        with path.open("w") as out:
            process = subprocess.Popen([*PROGRAM, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment)
        started[name] = process, path
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()
