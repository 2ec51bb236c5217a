"""Kernels are compiled for absent GPUs in processes of their own (without the interpreter), beside the other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OFFLINE = ["-m", "warploom.kernels.tools.compile_offline"]
PROGRAMS = {
    "large": OFFLINE,
    "small": [*OFFLINE, "--small", "--arch", "90"],
    "trace": [str(Path(__file__).with_name("trace_operators.py"))],
}


@pytest.fixture(scope="session", autouse=True)
def surveys(request, tmp_path_factory):
    """name of a program → its running process and the file it writes to; none if no test will ask."""
    if not any("survey" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield {}
        return
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    started = {}
    for name, arguments in PROGRAMS.items():
        path = tmp_path_factory.mktemp("offline") / f"{name}.txt"
        with path.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        started[name] = process, path
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def survey(surveys):
    """The last line of what a program said, once it is done."""

    def last_line(name):
        process, path = surveys[name]
        process.wait()
        text = path.read_text()
        last = text.strip().splitlines()[-1] if text.strip() else ""
        assert last[:1] in ("[", "{"), text[-3000:]
        return last

    return last_line
