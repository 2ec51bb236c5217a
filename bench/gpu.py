"""Everything worth doing with a few minutes of a GPU: `make gpu MINUTES=9`.

For a machine on which nothing can be installed (torch, triton and numpy are enough), met rarely, and for kernels that
may never have run before. A wrong address costs a process its GPU for good; a barrier nobody reaches hangs it. So
nothing runs in this process:

1. each op is held to its oracle, in each precision, by a process of its own (`warploom.kernels.tools.verify`), many at
once;
2. the tests that need a GPU run where pytest is there;
3. the benches run, most important first; one whose process dies is started again, without the part that killed it.

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
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.core import tuned
from ..tokenizer.sources import write_text
from . import environment, harness, table
from .schema import load_record

ROOT = environment.ROOT
DTYPES = ("bfloat16", "float32", "float16")
CASES = 8
"""How many cases of an op one process checks: compiling them takes most of its time."""
TESTS = ("test_gpu.py", "test_attention_and_experts.py", "test_model.py", "test_in_pytorch.py")
BENCHES = (("kernels", 0.55, 3.0), ("train", 0.5, 6.0), ("serve", 1.0, 8.0), ("kernels", 1.0, 3.0), ("train", 1.0, 6.0))
"""Which bench, its share of the time that is left, and the minutes after which one of its parts counts as hung."""
WHOLE_FILES = ("*.json", "*.png", "gpu.log")


@dataclass
class Session:
    """One run: how long it may take, and where things go."""

    deadline: float
    folder: Path
    copy: Path | None = None
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, command: list[str], seconds: float) -> tuple[str, str]:
        """Run a process; return what it printed and how it ended ("" is well), after these seconds at the latest."""
        started = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
            return printed, f"stopped after {seconds:.0f} s" if self.left() > 0 else "the time was up"
        return printed, "" if started.returncode == 0 else _ending(started.returncode)

    def keep(self) -> None:
        """Copy what there is to the second folder: flat, without what is only of use here."""
        if self.copy is not None:
            self.copy.mkdir(parents=True, exist_ok=True)
            for path in [*(path for kind in WHOLE_FILES for path in self.folder.glob(kind)), tuned.FILE]:
                if path.exists():
                    shutil.copy(path, self.copy)


def _stop(process: subprocess.Popen) -> str:
    """End a process: it may save what it has, if it still listens."""
    for ask in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[0] or ""
    return ""


def _ending(code: int) -> str:
    return f"exit {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def main(argv: list[str] | None = None) -> int:
    """Check, test and measure within the minutes given: 0 if all that was run is well, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="where records go (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None, help="a second place for them ($OUT)"
    )
    parser.add_argument("--tune", action="store_true", help="search launch settings before anything is timed")
    options = parser.parse_args(argv)
    device = device_name()
    if device is None:
        print(
            "make gpu: PyTorch sees no GPU here; `warploom bench kernels` prints what is known without", file=sys.stderr
        )
        return 2
    folder = options.results / environment.slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(time.monotonic() + 60 * options.minutes, folder, options.out)
    found = check_ops(session)
    wrong = {name: ended for name, ended in found.items() if ended}
    broken = {name.split()[0] for name in wrong}
    if "attention" in broken and "WARPLOOM_HOPPER" not in session.environment:
        broken -= {"attention"} if without_hopper(session) else set()
    tests = run_tests(session)
    skipped = sorted(broken)
    if options.tune:
        measure(session, "kernels", 0.9, 9.0, options.results, ["--tune", "--skip", ",".join(skipped)])
    for name, share, limit in BENCHES:
        flags = ["--skip", ",".join(skipped)] if name == "kernels" else []
        measure(session, name, share, limit, options.results, flags)
    failures = report(session, found, tests)
    with contextlib.suppress(Exception):  # a picture is welcome, not needed
        draw(session)
    session.keep()
    return 1 if failures else 0


def without_hopper(session: Session) -> bool:
    """Is attention right with fewer of its Hopper kernels, or none? Then it stays so for what follows."""
    for kept in ("forward,dq", "forward", "0"):
        session.environment["WARPLOOM_HOPPER"] = kept
        if not any(check_ops(session, "attention ").values()):
            say(f"attention is wrong with all its Hopper kernels, and right with WARPLOOM_HOPPER={kept}: kept so")
            return True
    del session.environment["WARPLOOM_HOPPER"]
    return False


def device_name() -> str | None:
    """The GPU's name, if PyTorch sees one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def check_names() -> list[str]:
    """A name for each op, precision and share of the op's cases, most important first: `attention bfloat16 1/3`."""
    from .kernels import fused_ops

    shares = {op.name: max(1, round(sum(not case.bench for case in op.cases) / CASES)) for op in fused_ops()}
    return [f"{op} {dtype} {i + 1}/{n}" for dtype in DTYPES for op, n in shares.items() for i in range(n)]


def check_ops(session: Session, only: str = "") -> dict[str, str]:
    """Results of checks by name: how the check of each name that begins so ended; "" is right. What is on record as
    right is not run again."""
    path = session.folder / "checks.json"
    code = environment.fingerprint("gpu", ("kernels",)) + session.environment.get("WARPLOOM_HOPPER", "")
    known = json.loads(path.read_text()) if path.exists() else {}
    right = set(known.get(code, []))
    names = [name for name in check_names() if name.startswith(only)]

    def check(name: str) -> tuple[str, str]:
        op, dtype, share = name.split()
        command = [sys.executable, "-m", "warploom.kernels.tools.verify", op, "--dtype", dtype, "--share", share]
        printed, ended = session.run([*command, "--device", "cuda"], 120)
        lines = [line for line in printed.splitlines() if line.strip()]
        return name, f"{ended}: {' | '.join(lines[-3:])}"[:300] if ended else ""

    with ThreadPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 2))) as pool:
        found = dict(pool.map(check, [name for name in names if name not in right]))
    right |= {name for name, ended in found.items() if not ended}
    write_text(path, json.dumps({**known, code: sorted(right)}, indent=1) + "\n")
    session.keep()
    return dict.fromkeys(right, "") | found


def run_tests(session: Session) -> str:
    """The tests that need a GPU, or run on one if there is: pytest's last lines."""
    if not importlib.util.find_spec("pytest"):
        return "no pytest here"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=line"]
    command += ["--import-mode=importlib", *(["-n", "8"] if importlib.util.find_spec("xdist") else [])]
    command += [f"tests/kernels/{name}" for name in TESTS] + ["tests/bench/test_cuda_timer.py"]
    printed, ended = session.run(command, 150)
    lines = [line[:200] for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    return "\n".join([*lines[:12], f"{last[:200]} {ended}".strip()])


def measure(session: Session, bench: str, share: float, limit: float, results: Path, flags: list[str]) -> None:
    """Run a bench in a process of its own, again as long as each one loses its life to another part."""
    end = time.monotonic() + share * session.left()
    deadly = session.folder / f"{bench}.deadly"
    before = None
    while end - time.monotonic() > 20:
        minutes = f"{(end - time.monotonic()) / 60:.2f}"
        command = [sys.executable, "-m", "warploom.engine.cli", "bench", bench, "--minutes", minutes]
        command += ["--results", str(results), "--limit", str(limit), *flags]
        _, ended = session.run(command, end - time.monotonic() + 60 * limit)
        say(f"{bench}: {ended or 'done'}")
        names = deadly.read_text() if deadly.exists() else None
        if names == before:
            return
        before = names


def draw(session: Session) -> None:
    """The roofline of what was timed, beside its record."""
    from . import kernels

    path = session.folder / "kernels.json"
    kernels.draw(load_record(path, "kernels", session.folder.name), path.with_suffix(".png"))


def report(session: Session, found: dict[str, str], tests: str) -> int:
    """Print what happened, in short; how many things are wrong."""
    wrong = {name: ended for name, ended in found.items() if ended}
    say(f"\nchecks: {len(found) - len(wrong)} right" + "".join(f"\n  {name}: {ended}" for name, ended in wrong.items()))
    say(f"tests: {tests}")
    failed = len(wrong) + ("failed" in tests or "error" in tests.lower())
    for bench in dict.fromkeys(name for name, *_ in BENCHES):
        record = load_record(session.folder / f"{bench}.json", bench, session.folder.name)
        deadly = session.folder / f"{bench}.deadly"
        lost = [line.partition(" ")[2] for line in deadly.read_text().splitlines()] if deadly.exists() else []
        say("\n".join([f"{bench}:", *table.brief(record), *(f"  took its process down: {name}" for name in lost)]))
        failed += len(lost)
    say(f"all of it: {session.folder}" + (f" and {session.copy}" if session.copy else ""))
    return failed


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
