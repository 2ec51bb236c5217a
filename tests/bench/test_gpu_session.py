"""A session on a GPU survives its kernels: rehearsed here with processes that crash, hang and lose their device."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest

from warploom import kernels
from warploom.bench import decode_profile, environment, gpu, kernel_calls, smoke
from warploom.bench.gpu import Session, check_names, check_ops
from warploom.bench.kernels import _parts_of, fused_ops
from warploom.bench.schema import load_record

BENCH = """
import os, sys, time
from pathlib import Path
from warploom.bench import environment, harness
from warploom.bench.harness import Machine, Options, Part, run_bench
from warploom.bench.schema import Row, Spread

def part(name, action=lambda: None):
    def measure(machine):
        action()
        return [Row(name, "ours", Spread.of([1.0]))]
    return Part(name, measure)

def lose():
    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    harness.synchronize = gone
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

here = environment.capture("cpu")
environment.capture = lambda device: here  # asks git: of the limit, only the part that hangs takes much

slow = part("hang", lambda: time.sleep(60))
parts = [part("a"), part("crash", os.abort), part("b"), slow, part("lost", lose), part("c")]
options = Options(results=Path(sys.argv[1]), device="cpu", limit=0.05)
outcome = run_bench("fake", parts, options, machine=Machine("cpu"), say=lambda line: None)
sys.exit(len(outcome.failed))
"""


def test_gpu_session_crash_costs_one_part(tmp_path):
    """A part that takes its process down costs itself alone."""
    codes = []
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", BENCH, str(tmp_path)], capture_output=True, timeout=60, check=False
        )
        codes.append(done.returncode)
    (path,) = tmp_path.glob("*/fake.json")
    assert list(load_record(path, "fake", path.parent.name).parts) == ["a", "b", "c"]
    assert codes[0] < 0 < codes[1] and codes[2] > 0 and codes[3] == 3
    names = {line.partition(" ")[2] for line in path.with_suffix(".deadly").read_text().splitlines()}
    assert names == {"crash", "hang", "lost"}


@pytest.fixture
def session(tmp_path):
    return Session(time.monotonic() + 60, tmp_path / "results", tmp_path / "out")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU machine with two ops; what each command does is a function of the command and its environment."""
    asked = []

    class Machine:
        answers = staticmethod(lambda command, environment: ("", ""))

    def run(session, command, seconds, extra=None):
        asked.append(" ".join(command[2:]))
        return Machine.answers(asked[-1], session.environment)

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(gpu, "device_name", lambda: "Fake GPU")
    monkeypatch.setattr(gpu, "capability", lambda: 90)
    monkeypatch.setattr(gpu, "check_names", lambda: ["attention bfloat16 1/1", "moe bfloat16 1/2", "moe bfloat16 2/2"])
    monkeypatch.setattr(gpu, "draw", lambda session: None)
    Machine.asked = asked
    return Machine


def test_bench_hanging_process_is_ended(session):
    """A process that hangs or crashes is ended and told so."""
    session.folder.mkdir()
    printed, ended = session.run(["sh", "-c", "echo begun; exec sleep 60"], 2)
    assert (printed.partition("\n")[0], ended) == ("begun", "stopped after 2 s")
    printed, ended = session.run([sys.executable, "-c", "import os; print(1, flush=True); os.abort()"], 30)
    assert (printed, ended) == ("1\n", "killed by SIGABRT")
    assert session.run([sys.executable, "-c", ""], 30) == ("", "")
    assert "os.abort" in (session.copy / "gpu.log").read_text()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="subprocess has no process_group")
def test_a_process_is_a_group_of_the_same_session(session):
    """A shell that was killed takes its session along: a process in one of its own would stay on the GPU."""
    session.folder.mkdir()
    printed, _ = session.run([sys.executable, "-c", "import os; print(os.getsid(0), os.getpgrp() == os.getpid())"], 30)
    assert printed.split() == [str(os.getsid(0)), "True"]


def test_gpu_session_in_background_interrupts_its_parts(machine, tmp_path):
    """A shell starts what is in the background with the interrupt ignored, and so would be every process from here: a
    part whose slot is over would be killed before it is told, and count as one that took its process down."""
    program = "import signal; raise SystemExit(signal.getsignal(signal.SIGINT) != signal.default_int_handler)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        gpu.main(["--results", str(tmp_path), "--minutes", "0.5"])
        assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_gpu_session_wrong_op_not_timed(machine, tmp_path, capsys):
    """Wrong ops are not timed and what was right is not checked again."""
    bad = "moe bfloat16, switch: bad", "exit 1"
    machine.answers = lambda command, _: bad if "verify moe" in command else ("", "")
    arguments = ["--results", str(tmp_path), "--minutes", "0.5"]
    assert gpu.main(arguments) == 1
    assert any("bench kernels" in command and "--skip moe" in command for command in machine.asked)
    assert "moe bfloat16 1/2: exit 1: moe bfloat16, switch: bad" in capsys.readouterr().out
    machine.asked.clear()
    gpu.main(arguments)
    checked = [command for command in machine.asked if "verify" in command]
    assert checked and all("verify moe" in command for command in checked)


def test_op_that_hung_is_not_checked_in_other_dtypes(machine, tmp_path, monkeypatch):
    names = [f"{op} {dtype} 1/1" for dtype in gpu.DTYPES for op in ("attention", "moe")]
    monkeypatch.setattr(gpu, "check_names", lambda: names)
    machine.answers = lambda command, _: ("", "stopped after 90 s") if "verify moe" in command else ("", "")
    gpu.main(["--results", str(tmp_path), "--minutes", "0.5"])
    assert sum("verify moe" in command for command in machine.asked) == 1
    assert sum("verify attention" in command for command in machine.asked) == 3


def test_check_without_time_is_not_wrong(machine, tmp_path, capsys):
    machine.answers = lambda command, _: ("", gpu.TIME_UP) if "verify moe" in command else ("", "")
    assert gpu.main(["--results", str(tmp_path), "--minutes", "0.5"]) == 0
    assert "checks: 1 right, 2 left for the next run" in capsys.readouterr().out


@pytest.mark.parametrize("portable", [True, False], ids=["portable right", "both wrong"])
def test_portable_attention_replaces_hung_hopper(machine, tmp_path, portable):
    """The portable attention stands in for a hopper kernel that hangs."""
    seen = {}

    def answers(command, environment):
        off = environment.get("WARPLOOM_HOPPER") == "0"
        seen[command.split(" --minutes")[0]] = off, "--skip attention" in command
        return ("", "stopped after 120 s") if "verify attention" in command and not (off and portable) else ("", "")

    machine.answers = answers
    assert gpu.main(["--results", str(tmp_path), "--minutes", "0.5"]) == 1
    assert seen["warploom.engine.cli bench kernels"] == (portable, not portable)
    assert seen["warploom.engine.cli bench train"][0] == portable


def test_plan_of_nine_minutes_has_every_part_in_order(machine, tmp_path):
    assert 90 + sum(seconds for _, seconds, *_ in gpu.PLAN) <= 9 * 60 - 60
    gpu.main(["--results", str(tmp_path), "--minutes", "9"])
    kinds = ["bench.smoke", "verify", "bench serve", "bench train", "bench kernels", "test_gpu.py"]
    first = [next(i for i, command in enumerate(machine.asked) if kind in command) for kind in kinds]
    assert first == sorted(first)
    assert all(
        any(f"--only {part}" in command for command in machine.asked) for part in ("batch 1", "llama-1b", "mixed")
    )


def test_op_that_took_a_process_down_is_skipped(machine, tmp_path):
    def answers(command, _):
        if "bench kernels" in command and "--skip" in command and "moe" not in command:
            (tmp_path / "fake-gpu" / "kernels.deadly").write_text("code moe forward\n")
            return "", "exit 1"
        return "", ""

    machine.answers = answers
    gpu.main(["--results", str(tmp_path), "--minutes", "0.5"])
    skipped = [command.split("--skip ")[1] for command in machine.asked if "bench kernels" in command]
    assert skipped[:2] == ["", ",moe"]


def test_timed_parts_check_nothing_again():
    pattern = gpu.TIMED[1]
    names = [part.name for op in fused_ops() for part in _parts_of(op, "bfloat16")]
    assert {name for name in names if not fnmatch(name, pattern)} == {f"right: {op.name}" for op in fused_ops()}


def test_checks_killed_midway_keep_what_was_right(machine, session):
    session.folder.mkdir()

    def answers(command, _):
        if "verify moe" in command:
            raise KeyboardInterrupt
        return "", ""

    machine.answers = answers
    with pytest.raises(KeyboardInterrupt):
        check_ops(session)
    (right,) = json.loads((session.folder / "checks.json").read_text()).values()
    assert right == ["attention bfloat16 1/1"]


def test_record_of_a_running_bench_is_in_the_second_folder(session):
    """A bench saves part after part; a session that is killed must have lost at most the part under way."""
    session.folder.mkdir()
    record, kept = session.folder / "kernels.json", session.copy / "kernels.json"
    program = f"""
import pathlib, time
pathlib.Path({str(record)!r}).write_text("a part")
end = time.monotonic() + 20
while not pathlib.Path({str(kept)!r}).exists():
    assert time.monotonic() < end
    time.sleep(0.02)
"""
    with gpu.keeping(session, every=0.02):
        assert session.run([sys.executable, "-c", program], 30) == ("", "")
    assert [path.name for path in sorted(session.copy.iterdir())] == ["gpu.log", "kernels.json"]


def test_kernels_compile_where_home_takes_no_files(monkeypatch, tmp_path):
    """Triton keeps what it compiled below the home directory, and without a cache compiles nothing."""
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gpu.compiler_cache() == {}
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert Session(0.0, tmp_path).environment["TRITON_HOME"] == str(environment.ROOT / "build")


def test_gpu_tests_collect_without_hypothesis():
    """A GPU machine has pytest at most; a file that cannot be imported there is a test that never runs."""
    program = "import sys; sys.modules['hypothesis'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    files = [str(environment.ROOT / "tests" / "kernels" / name) for name in gpu.TESTS]
    options = ["--collect-only", "-q", "-o", "addopts=", "--import-mode=importlib"]
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", program, *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout[-2000:]


def test_second_command_sanitizes_what_is_wrong(machine, tmp_path):
    machine.answers = lambda command, _: ("", "exit 1") if "verify moe" in command else ("", "")
    gpu.main(["--results", str(tmp_path), "--minutes", "4", "--more"])
    assert any("memcheck" in command and "verify moe" in command for command in machine.asked)
    assert not any("bench.smoke" in command for command in machine.asked)
    assert any("decode_profile" in command for command in machine.asked)


def test_second_command_profiles_six_named_kernels(machine, tmp_path, monkeypatch):
    """All in one process, each by one launch that the program names; the page has each as a kernel of that op."""
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: tool if tool == "ncu" else None)
    gpu.main(["--results", str(tmp_path), "--minutes", "4", "--more"])
    (command,) = [command for command in machine.asked if "kernel_calls" in command]
    pattern = command.partition("regex:")[2].split()[0]
    page = (environment.ROOT / "docs" / "gpu.md").read_text()
    kernels_of_page = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \| \d", page, re.MULTILINE))
    matching = {(op, kernel) for op, kernel in kernels_of_page if re.search(pattern, kernel)}
    assert len(kernel_calls.KERNELS) == 6
    assert {(op, kernel) for kernel, op in kernel_calls.KERNELS.items()} <= matching
    assert {kernel for _, kernel in matching} == set(kernel_calls.KERNELS)


def test_large_cases_are_compiled_beside_the_checks(machine, tmp_path):
    """Attention's once more without its Hopper kernels, which are timed beside them; before anything is timed."""
    gpu.main(["--results", str(tmp_path), "--minutes", "0.5"])
    compiled = [command for command in machine.asked if "compile_offline" in command]
    assert sorted(command.split()[2] for command in compiled) == sorted(op for op, _ in gpu.COMPILED)
    timed = next(i for i, command in enumerate(machine.asked) if "bench serve" in command)
    assert all(machine.asked.index(command) < timed and "--arch 90" in command for command in compiled)


def test_smoke_ends_with_what_may_hang():
    first, *_, last = smoke.STEPS
    assert (first, last) == ("toolchain", "attention")


def test_decode_profile_of_two_batches(monkeypatch, capsys):
    """One model directory; a table for each batch."""
    span = SimpleNamespace(start=0, end=64)
    monkeypatch.setattr(decode_profile, "save_random", lambda *_: None)
    monkeypatch.setattr(decode_profile, "ours", lambda job: job)
    monkeypatch.setattr(decode_profile, "profiled", lambda server, work: [("a", span)] * (server.batch == len(work)))
    assert decode_profile.main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch")]
    assert lines == [f"batch {batch}: 1 µs a step, 100 % of it busy, 0 launches" for batch in (1, 32)]


def test_profile_counts_busy_time_once():
    """Of kernels side by side, the time that the device waits is between the end of all and the next one."""
    spans = [SimpleNamespace(start=start, end=end) for start, end in ((0, 10), (5, 20), (30, 40))]
    lines = decode_profile.table([*zip(("a", "b", "a"), spans)], steps=2)
    assert lines[0] == "20 µs a step, 75 % of it busy, 2 launches"
    assert [line.split() for line in lines[1:]] == [["10.0", "µs", "1.0", "×", "a"], ["7.5", "µs", "0.5", "×", "b"]]
    assert len(decode_profile.table([], 1)) == 1


def test_second_command_of_three_minutes_begins_every_bench(machine, tmp_path):
    assert sum(seconds for _, seconds, *_ in gpu.MORE) <= 3 * 60 - 20
    gpu.main(["--results", str(tmp_path), "--minutes", "3", "--more"])
    begun = [command for command in machine.asked if "--again --only" in command and "--minutes 9.00" in command]
    assert [command.split()[2] for command in begun] == [bench for bench, *_ in gpu.MORE]


def test_checks_are_on_record_by_the_code_they_checked(machine, session, monkeypatch):
    session.folder.mkdir()
    assert check_ops(session) == dict.fromkeys(gpu.check_names(), "")
    monkeypatch.setattr(environment, "fingerprint", lambda *_: "other code")
    machine.asked.clear()
    check_ops(session)
    assert len(machine.asked) == 3 and len(json.loads((session.folder / "checks.json").read_text())) == 2
    assert (session.copy / "checks.json").exists()


def test_every_case_has_its_share_of_checks():
    """Every case of every op has its share in the checks."""
    names = check_names()
    for op in kernels.ops():
        small = [case for case in op.cases if not case.bench]
        for dtype in gpu.DTYPES if op.fused else ():
            shares = [name.split()[2] for name in names if name.startswith(f"{op.name} {dtype} ")]
            parts = [small[int(share.split("/")[0]) - 1 :: int(share.split("/")[1])] for share in shares]
            assert sum(map(len, parts)) == len(small)
