"""Everything worth doing with a few minutes of a GPU: `make gpu MINUTES=9`.

For a machine on which nothing can be installed: torch, triton and numpy are enough. Tests that need a GPU run first
where pytest is there; then the benches, the kernels first, each op checked on the device before it is timed. Every part
is saved as it ends, and the same command goes on where the last one stopped.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

from ..engine.cli import bench as verb
from . import harness

ROOT = Path(__file__).resolve().parent.parent
SHARE_OF_TESTS = 0.3


def main(argv: list[str] | None = None) -> int:
    """Run the tests, then the benches, within the minutes given; 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="where records go")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "make gpu: PyTorch sees no GPU here; `warploom bench kernels` prints what is known without one",
            file=sys.stderr,
        )
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    wrong = run_tests(60 * options.minutes * SHARE_OF_TESTS)
    for name in ("kernels", "train"):
        left = (deadline - time.monotonic()) / 60
        plot = ["--plot"] if importlib.util.find_spec("matplotlib") else []
        wrong += (
            verb.run([name, "--minutes", f"{left:.2f}", "--results", str(options.results), *plot]) if left > 0 else 0
        )
    return 1 if wrong else 0


def run_tests(seconds: float) -> int:
    """The tests marked `gpu`; 1 if one fails, 0 also where pytest is missing or the time is up."""
    if not importlib.util.find_spec("pytest"):
        print("make gpu: no pytest here; each kernel is still checked before it is timed", file=sys.stderr)
        return 0
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=", "tests"]
    try:
        result = subprocess.run([*command, "--import-mode=importlib"], cwd=ROOT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"make gpu: the tests took more than {seconds:.0f} s and were stopped", file=sys.stderr)
        return 0
    return int(result.returncode not in (0, 5))


if __name__ == "__main__":
    sys.exit(main())
