"""Launch-setting search behind `warploom bench kernels --tune`.

Candidates are the defaults with one or two of their numbers halved or doubled. Many of them are not worth a GPU's time:
their loops spill, or they ask for more shared memory than there is. The compiler needs no GPU to say so, so all are
compiled first, in processes of their own on all the cores there are (`python -m warploom.kernels.tools.tuning` is one
of these), and what is left is timed, shortly; the best few run against the default once more, in turn. What is faster
by a margin is filed in `tuned.json`, under the family of the device.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from statistics import median

import torch

from ..core import tuned
from ..core.lang import shared_memory

MARGIN = 0.98
"""A change has to be this much faster to be believed."""
RANGES = {"num_warps": (1, 16), "num_stages": (1, 5)}
FINALISTS, ROUNDS = 3, 7
Prune = Callable[[str, list[dict]], list[dict]]


def candidates(default: dict) -> list[dict]:
    """The default, and neighbors that differ by a step in one or two settings: 33 for a kernel with four."""
    choices = []
    for name, value in default.items():
        low, high = RANGES.get(name, (1, 16384))
        near = (value - 1, value, value + 1) if name == "num_stages" else (value // 2, value, value * 2)
        choices.append([n for n in near if low <= n <= high or n == value])
    found = [dict(zip(default, numbers)) for numbers in itertools.product(*choices)]
    changes = [sum(one[name] != default[name] for name in default) for one in found]
    return [default, *(one for one, changed in zip(found, changes) if 0 < changed <= 2)]


def search(
    step: Callable, timer, device: torch.device, prune: Prune = lambda kernel, found: found, done: set | None = None
) -> Iterator[tuple[str, float, float, dict]]:
    """Tune each kernel that `step` launches: yield name, default seconds, best seconds, best settings (recorded).

    A kernel and key in `done` are left alone; what is searched here is added to it."""
    tuned.asked.clear()
    step()
    done = set() if done is None else done
    for kernel, (key, default) in dict(tuned.asked).items():
        if (kernel, key) in done:
            continue
        done.add((kernel, key))
        times = {}
        found = [default, *(one for one in prune(kernel, candidates(default)) if one != default)]
        for place, settings in enumerate(found):
            times[place] = _seconds(step, timer, kernel, settings, 5)
        finalists = sorted(times, key=times.get)[:FINALISTS]
        rounds = [{i: _seconds(step, timer, kernel, found[i], 10) for i in {0, *finalists}} for _ in range(ROUNDS)]
        again = {i: median(one[i] for one in rounds) for i in rounds[0]}
        best = min(again, key=again.get)
        best = best if again[best] < MARGIN * again[0] else 0
        if best:
            tuned.record(device, kernel, key, found[best])
        yield kernel, again[0], again[best], found[best]


def _seconds(step: Callable, timer, kernel: str, settings: dict, calls: int) -> float:
    with tuned.trying(kernel, settings), contextlib.suppress(Exception):
        step()
        return timer.sample(step, calls)
    return float("inf")


def pruned_by_compiler(op: str, case: str, dtype: str, arch: int) -> Prune:
    """Keep settings that compile for an architecture and spill no more inside loops than the default (the first)."""

    def prune(kernel: str, found: list[dict]) -> list[dict]:
        workers = max(1, min(len(found), (os.cpu_count() or 2) - 1))
        about = {"op": op, "case": case, "dtype": dtype, "arch": arch, "kernel": kernel}
        requests = [{**about, "settings": found[i::workers]} for i in range(workers)]
        spilled = {}
        for i, lines in enumerate(_compile_all(requests)):
            spilled |= {i + workers * n: json.loads(line) for n, line in enumerate(lines)}
        return [one for n, one in enumerate(found) if n == 0 or _fits(spilled.get(n), spilled.get(0) or 0)]

    return prune


def _fits(spilled: int | None, allowed: int) -> bool:
    return spilled is not None and spilled <= allowed


def _compile_all(requests: Iterable[dict]) -> Iterator[list[str]]:
    environment = {**os.environ, "WARPLOOM_TRITON": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", __name__]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = []
    for request in requests:
        process = subprocess.Popen(command, env=environment, **pipe)
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        started.append(process)
    for process in started:
        yield process.stdout.read().splitlines()
        process.wait()


def main() -> None:
    """For each settings of a request: spills inside loops (without loops, bytes spilled); null where it does not
    compile or does not fit."""
    from ..core.op import ops
    from .compile_offline import costs

    request = json.load(sys.stdin)
    op = next(op for op in ops() if op.name == request["op"])
    case = next(case for case in op.cases if case.name == request["case"])
    for settings in request["settings"]:
        spilled = None
        with contextlib.suppress(Exception), tuned.trying(request["kernel"], settings):
            found = costs(op, case, getattr(torch, request["dtype"]), request["arch"])
            if max(cost.shared for cost in found) <= shared_memory(request["arch"]):
                spilled = max(cost.loop_spills if cost.loops else cost.stack for cost in found)
        print(json.dumps(spilled), flush=True)


if __name__ == "__main__":
    main()
