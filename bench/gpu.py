"""GPU session: checks, tests and benchmarks in a few minutes, unattended: `make gpu MINUTES=9`.

For a machine on which nothing can be installed (torch, triton and numpy are enough), met rarely, and for kernels that
may never have run before. An illegal address costs a process its CUDA context; a barrier that is never reached hangs
it. So nothing runs in this process:

1. a smoke test: a line for each thing without which the rest is in vain (`smoke.py`);
2. each op is held to its oracle in bfloat16 by a process of its own (`warploom.kernels.tools.verify`), many at once;
beside both the large cases that take longest are compiled, for the benches to find;
3. `PLAN`: parts of the benches by value, each in a slot of its own, so that one that hangs costs only that; one whose
process dies is started again, without the part that killed it;
4. the tests that need a GPU, where pytest is there; then the other precisions; then what else the benches have.

`--more` is for a second command: a profile of decoding; what was wrong again under `compute-sanitizer` or, if nothing
was, the busiest kernels under `ncu`; and the benches beside all peers.

An op that is wrong is not timed. If attention is wrong with its Hopper kernels only, the portable ones stand in. All is
saved as it ends, below --results and, if OUT is set or --out given, in that folder too; the same command goes on where
the last one stopped. The last lines say what happened, in short; the whole story is in gpu.log.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..kernels.core import tuned
from ..tokenizer.sources import write_text
from . import environment, harness, kernel_calls, table
from .schema import load_record

ROOT = environment.ROOT
DTYPES = ("bfloat16", "float32", "float16")
CASES = 8
"""Cases of an op that one process checks: compiling them takes most of its time."""
CHECK_SECONDS = 90
"""A check that takes longer hangs. The plan waits for the last of them, so more would cost its last parts."""
TESTS = (
    "test_gpu.py", "test_batch_invariance.py", "test_attention_and_experts.py", "test_model.py", "test_in_pytorch.py",
)  # fmt: skip
FEW = {"WARPLOOM_PEERS": "torch_ops,liger,cut_cross_entropy"}
ALONE = {"WARPLOOM_PEERS": ""}
TIMED = ["--only", "* [fb]o*"]
"""Parts named "… forward" and "… both": what "right: …" asks has been asked by the checks."""
SHORT = ["--rounds", "2", "--seconds", "6"]
PLAN = (
    ("serve", 50, ["--only", "batch 1", *SHORT], ALONE),
    ("train", 60, ["--only", "gpt2-124m", "--rounds", "5", "--seconds", "8"], {}),
    ("kernels", 95, [*TIMED, "--rounds", "5", "--seconds", "4"], FEW),
    ("train", 60, ["--only", "llama-1b", "--rounds", "5", "--seconds", "8"], {}),
    ("serve", 50, ["--only", "batch 32", *SHORT], ALONE),
    ("serve", 55, ["--only", "mixed", *SHORT], ALONE),
)
"""Most valuable first: benchmark, its slot in seconds, its flags, its environment. The smoke test and the checks (about
90 s) and all slots fit into nine minutes, and leave a minute for the tests."""
MORE = (
    ("kernels", 50, ["--only", "attention both", "--rounds", "5", "--seconds", "4"], FEW),
    ("serve", 50, ["--only", "batch 1", *SHORT], {}),
    ("train", 60, ["--only", "gpt2-124m", "--rounds", "5", "--seconds", "8"], {}),
)
"""Plan of the second command, after checks and profiles: attention's larger tiles, and the main workloads beside all
peers. Three minutes are enough for it."""
REST = (("kernels", 0.55, 3.0), ("train", 0.5, 6.0), ("serve", 1.0, 8.0), ("kernels", 1.0, 3.0), ("train", 1.0, 6.0))
"""Benchmark, its share of the time left, and the minutes after which one of its parts counts as hung."""
TIME_UP = "the time was up"
"""Result of a process that had no time left: neither a pass nor a failure."""
COMPILED = (("attention", None), ("attention", "0"), ("paged_attention", None), ("moe", None), ("linear", None))
"""Ops whose large cases take longest to compile, one second a kernel, and WARPLOOM_HOPPER: from the start, when all
cores but one are idle. A part of `bench kernels` that compiled all of its own would count as hung."""
FEWER_HOPPER = ("forward,dq", "forward", "0")
"""Values of WARPLOOM_HOPPER to fall back to, best first."""
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Each tensor an allocation of its own: compute-sanitizer does not see where one ends within PyTorch's pool."""
NCU = (
    "ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "basic",
    "--section", "ComputeWorkloadAnalysis", "--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats",
)  # fmt: skip
APART: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
"""A group of its own, to be ended whole; but of this session, so that who ends that leaves nothing on the GPU."""
WHOLE_FILES = ("*.json", "*.png", "gpu.log")


@dataclass
class Session:
    """State of a session: deadline, environment, output folders."""

    deadline: float
    folder: Path
    copy: Path | None = None
    environment: dict[str, str] = field(default_factory=lambda: os.environ | compiler_cache())
    saving: threading.Lock = field(default_factory=threading.Lock)
    copying: threading.Lock = field(default_factory=threading.Lock)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds left."""
        say(f"{max(self.left(), 0):4.0f} s left  {text}")

    def run(self, command: list[str], seconds: float, extra: dict[str, str] | None = None) -> tuple[str, str]:
        """Run a process with a timeout; return its output and how it ended ("" is well)."""
        if self.left() < 5:
            return "", TIME_UP
        started = subprocess.Popen(
            command, cwd=ROOT, env=self.environment | (extra or {}), text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **APART,
        )  # fmt: skip
        hung = False
        try:
            printed, _ = started.communicate(timeout=max(1.0, min(seconds, self.left())))
        except subprocess.TimeoutExpired:
            hung, printed = True, _stop(started)
        with (self.folder / "gpu.log").open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n{printed}")
        self.keep()
        if hung:
            return printed, f"stopped after {seconds:.0f} s" if self.left() > 0 else TIME_UP
        return printed, "" if started.returncode == 0 else _ending(started.returncode)

    def keep(self) -> None:
        """Copy results to the second folder, flat, without what is useful only here."""
        if self.copy is None:
            return
        self.copy.mkdir(parents=True, exist_ok=True)
        with self.copying:
            for path in [*(path for kind in WHOLE_FILES for path in self.folder.glob(kind)), tuned.FILE]:
                if path.exists():
                    half = self.copy / f"{path.name}.half"  # who is killed here leaves the last copy whole
                    shutil.copy(path, half)
                    half.replace(self.copy / path.name)


def _stop(process: subprocess.Popen) -> str:
    """Terminate a process, giving it time to save; kill it if it does not end."""
    for ask in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[0] or ""
    return ""


def _ending(code: int) -> str:
    return f"exit {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def main(argv: list[str] | None = None) -> int:
    """Check, test and measure within the minutes given: exit code 0 if all went well, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="where records go (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None, help="a second place for them ($OUT)"
    )
    parser.add_argument("--more", action="store_true", help="look closer, after a first run")
    parser.add_argument("--tune", action="store_true", help="search launch settings before anything is timed")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this in the background has it ignored
    deadline = time.monotonic() + 60 * options.minutes  # loading PyTorch from a cold disk takes of it, too
    device = device_name()
    if device is None:
        print(
            "make gpu: PyTorch sees no GPU here; `warploom bench kernels` prints what is known without", file=sys.stderr
        )
        return 2
    folder = options.results / environment.slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(deadline, folder, options.out)
    with clocks(session), keeping(session):
        found, tests = second_pass(session, options) if options.more else first_pass(session, options)
    failures = report(session, found, tests)
    with contextlib.suppress(Exception):  # a picture is welcome, not needed
        draw(session)
    session.keep()
    return 1 if failures else 0


def first_pass(session: Session, options: argparse.Namespace) -> tuple[dict[str, str], str]:
    """First command: checks, plan, tests, the rest; return the results of checks, and the tests' last lines."""
    with compiling_ahead(session):
        printed, ended = session.run([sys.executable, "-m", "warploom.bench.smoke"], 40)
        say(printed.rstrip())
        session.say(f"smoke: {ended or 'done'}")
        found = check_ops(session, " bfloat16 ")
    session.say("checks: done")
    broken = {name.split()[0] for name, ended in found.items() if ended}
    if "attention" in broken and "WARPLOOM_HOPPER" not in session.environment:
        broken -= {"attention"} if without_hopper(session) else set()
    skip = ["--skip", ",".join(sorted(broken))]
    if options.tune:
        measure(session, "kernels", 0.9 * session.left(), 9.0, options.results, ["--tune", *skip])
    run_plan(session, options, PLAN, skip)
    tests = run_tests(session)
    session.say("tests: done")
    hung = {name.split()[0] for name, ended in found.items() if ended.startswith("stopped after")}
    for dtype in DTYPES[1:]:
        found |= check_ops(session, f" {dtype} ", without=hung)
    run_rest(session, options, skip, [])
    return found, tests


def second_pass(session: Session, options: argparse.Namespace) -> tuple[dict[str, str], str]:
    """Second command (`--more`): profiles, or failed checks under compute-sanitizer; then all peers."""
    found = check_ops(session, " bfloat16 ")
    wrong = [name for name, ended in found.items() if ended]
    printed, ended = session.run([sys.executable, "-m", "warploom.bench.decode_profile"], 70)
    say("\n".join(line for line in printed.splitlines() if "µs" in line))
    session.say(f"profile of decoding: {ended or 'done'}")
    for name in wrong[:3]:
        session.run(["compute-sanitizer", "--tool", "memcheck", *check_command(name)], 60, SANITIZED)
    if not wrong and shutil.which("ncu"):
        names = f"regex:^({'|'.join(kernel_calls.KERNELS)})$"
        _, ended = session.run([*NCU, "--kernel-name", names, sys.executable, "-m", kernel_calls.__name__], 60)
        session.say(f"ncu: {ended or 'done'}")
    skip = ["--skip", ",".join(sorted({name.split()[0] for name in wrong}))]
    run_plan(session, options, MORE, skip, "--again")
    run_rest(session, options, skip, ["--again"])
    return found, "left out"


@contextlib.contextmanager
def compiling_ahead(session: Session) -> Iterator[None]:
    """Compile the kernels of `COMPILED` into Triton's cache in the background, without the GPU."""
    with ThreadPoolExecutor(len(COMPILED)) as pool:
        for op, hopper in COMPILED:
            command = [sys.executable, "-m", "warploom.kernels.tools.compile_offline", "--table", op]
            extra = {"OMP_NUM_THREADS": "1"} | ({"WARPLOOM_HOPPER": hopper} if hopper else {})
            pool.submit(session.run, [*command, "--arch", str(capability())], CHECK_SECONDS, extra)
        yield


def run_plan(session: Session, options: argparse.Namespace, plan: tuple, skip: list[str], *again: str) -> None:
    """Run parts of the benchmarks, each in a time slot of its own."""
    for bench, seconds, flags, extra in plan:
        more = skip if bench == "kernels" else []
        limit = 0.75 if more else seconds / 60  # kernels are many parts
        measure(session, bench, seconds, limit, options.results, [*again, *flags, *more], extra, minutes=9.0)


def run_rest(session: Session, options: argparse.Namespace, skip: list[str], flags: list[str]) -> None:
    """Run everything else the benchmarks have, most important first."""
    for bench, share, limit in REST:
        more = [*TIMED, *skip] if bench == "kernels" else []
        measure(session, bench, share * session.left(), limit, options.results, [*flags, *more])


@contextlib.contextmanager
def keeping(session: Session, every: float = 5.0) -> Iterator[None]:
    """Copy to the second folder every few seconds: a bench saves its parts one by one, and a session may be killed."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(every):
            with contextlib.suppress(OSError):  # a file replaced meanwhile: the next round has it
                session.keep()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def compiler_cache() -> dict[str, str]:
    """TRITON_HOME in the checkout where the home directory takes no files: without a cache Triton compiles nothing."""
    if os.environ.get("TRITON_CACHE_DIR"):
        return {}
    cache = Path(os.environ.get("TRITON_HOME") or Path("~").expanduser()) / ".triton"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return {}
    except OSError:
        return {"TRITON_HOME": str(ROOT / "build")}


@contextlib.contextmanager
def clocks(session: Session) -> Iterator[None]:
    """Log GPU clocks and power every two seconds; a rate without them says little."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    with (session.folder / "gpu.log").open("a") as log:
        watcher = subprocess.Popen(["nvidia-smi", "dmon", "-s", "pucm", "-d", "2", "-o", "T"], stdout=log, stderr=log)
        try:
            yield
        finally:
            watcher.kill()
            watcher.wait()


def without_hopper(session: Session) -> bool:
    """Try attention with fewer of its Hopper kernels; if a setting is right, keep it for all that follows."""
    fewer = [replace(session, environment={**session.environment, "WARPLOOM_HOPPER": kept}) for kept in FEWER_HOPPER]
    with ThreadPoolExecutor(len(fewer)) as pool:  # at once: where each hangs, that costs as much as one
        wrong = list(pool.map(lambda one: any(check_ops(one, "attention bfloat16 ").values()), fewer))
    if all(wrong):
        return False
    kept = FEWER_HOPPER[wrong.index(False)]
    session.environment["WARPLOOM_HOPPER"] = kept
    say(f"attention is wrong with all its Hopper kernels, and right with WARPLOOM_HOPPER={kept}: kept so")
    return True


def device_name() -> str | None:
    """Name of the GPU, or None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def capability() -> int:
    """Compute capability as one number: 90."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def check_names() -> list[str]:
    """Names of all checks (op, dtype, share of the op's cases), most important first: `attention bfloat16 1/3`."""
    from .kernels import fused_ops

    shares = {op.name: max(1, round(sum(not case.bench for case in op.cases) / CASES)) for op in fused_ops()}
    return [f"{op} {dtype} {i + 1}/{n}" for dtype in DTYPES for op, n in shares.items() for i in range(n)]


def check_ops(session: Session, only: str = "", without: Container[str] = ()) -> dict[str, str]:
    """Run the checks whose name contains `only`, except ops in `without`; return how each ended ("" is right).
    What is on record as right is not run again."""
    path = session.folder / "checks.json"
    code = environment.fingerprint("gpu", ("kernels",)) + session.environment.get("WARPLOOM_HOPPER", "")
    right = set(_known_right(path).get(code, []))
    names = [name for name in check_names() if only in name and name.split()[0] not in without]

    def check(name: str) -> tuple[str, str]:
        printed, ended = session.run(check_command(name), CHECK_SECONDS, {"OMP_NUM_THREADS": "1"})
        if not ended:
            with session.saving:
                right.add(name)
                write_text(path, json.dumps({**_known_right(path), code: sorted(right)}, indent=1) + "\n")
        lines = [line for line in printed.splitlines() if line.strip()]
        return name, f"{ended}: {' | '.join(lines[-3:])}"[:300] if ended not in ("", TIME_UP) else ended

    due = [name for name in names if name not in right]
    with ThreadPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 2))) as pool:
        found = dict(pool.map(check, due))
    session.keep()
    return dict.fromkeys((name for name in names if name in right), "") | found


def _known_right(path: Path) -> dict[str, list[str]]:
    """Checks on record as passed, by the code that they checked."""
    return json.loads(path.read_text()) if path.exists() else {}


def check_command(name: str) -> list[str]:
    """Command line of a check such as `attention bfloat16 1/3`."""
    op, dtype, share = name.split()
    command = [sys.executable, "-m", "warploom.kernels.tools.verify", op, "--dtype", dtype, "--share", share]
    return [*command, "--device", "cuda"]


def run_tests(session: Session) -> str:
    """Run the tests that need or use a GPU; return pytest's last lines."""
    if not importlib.util.find_spec("pytest"):
        return "no pytest here"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=line"]
    command += ["--import-mode=importlib", "--continue-on-collection-errors"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command += [f"tests/kernels/{name}" for name in TESTS] + ["tests/bench/test_cuda_timer.py"]
    printed, ended = session.run(command, 150, {"OMP_NUM_THREADS": "2"})
    lines = [line[:200] for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    return "\n".join([*lines[:12], f"{last[:200]} {ended}".strip()])


def measure(
    session: Session, bench: str, seconds: float, limit: float, results: Path, flags: list[str],
    extra: dict[str, str] | None = None, minutes: float = 0.0,
) -> None:  # fmt: skip
    """Run a benchmark in a process of its own, and again as long as a process dies of another part.

    It has so many seconds, and `minutes` by its own estimate: with more than there are, each part is at least begun."""
    end = time.monotonic() + min(seconds, session.left())
    crashed = session.folder / f"{bench}.deadly"
    before = crashed.read_text() if crashed.exists() else None
    while end - time.monotonic() > 15:
        left = end - time.monotonic()
        command = [sys.executable, "-m", "warploom.engine.cli", "bench", bench]
        command += ["--minutes", f"{minutes or left / 60:.2f}"]
        command += ["--results", str(results), "--limit", f"{limit:.2f}", *flags]
        _, ended = session.run(command, left, extra)
        session.say(f"{bench} {' '.join(flags[:2])}: {ended or 'done'}")
        names = crashed.read_text() if crashed.exists() else None
        if names == before:
            return
        before = names
        if "--skip" in flags:  # an op that took a process down forward would do so both ways
            lost = {line.split()[1] for line in (names or "").splitlines()}
            at = flags.index("--skip") + 1
            flags = [*flags[:at], ",".join(sorted({*flags[at].split(","), *lost})), *flags[at + 1 :]]


def draw(session: Session) -> None:
    """Draw the roofline of what was timed, beside its record."""
    from . import kernels

    path = session.folder / "kernels.json"
    kernels.draw(load_record(path, "kernels", session.folder.name), path.with_suffix(".png"))


def report(session: Session, found: dict[str, str], tests: str) -> int:
    """Print a summary; return the number of failures."""
    late = sum(ended == TIME_UP for ended in found.values())
    wrong = {name: ended for name, ended in found.items() if ended not in ("", TIME_UP)}
    left = f", {late} left for the next run" if late else ""
    say(
        f"\nchecks: {len(found) - len(wrong) - late} right{left}"
        + "".join(f"\n  {name}: {ended}" for name, ended in wrong.items())
    )
    say(f"tests: {tests}")
    failed = len(wrong) + ("failed" in tests or "error" in tests.lower())
    for bench in dict.fromkeys(name for name, *_ in REST):
        record = load_record(session.folder / f"{bench}.json", bench, session.folder.name)
        crashed = session.folder / f"{bench}.deadly"
        lost = [line.partition(" ")[2] for line in crashed.read_text().splitlines()] if crashed.exists() else []
        say("\n".join([f"{bench}:", *table.brief(record), *(f"  took its process down: {name}" for name in lost)]))
        failed += len(lost)
    say(f"all of it: {session.folder}" + (f" and {session.copy}" if session.copy else ""))
    return failed


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
