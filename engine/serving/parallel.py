"""One model in several processes, for weights or speed beyond one device.

The first process has the scheduler, the engine and its callers. It starts the others and sends each the plan that it
gives its own runner, a few hundred bytes a step. All of them run that plan on their share of the heads and features
(engine/sharding.py), in pages of the same numbers, and meet inside the model; the whole logits are known to each, and a
draw depends on (seed, position) alone, so all choose the same tokens and nothing has to come back.

A process that dies breaks the team: the step under way fails, and so does every later one, with a sentence that says
which process it was. The others read their plans from a pipe that ends when the first process does, however it ends,
so none is left behind.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ..hub import load_model
from ..model import Transformer
from ..sharding import check, shard
from .plan import StepPlan
from .runner import Flight, Runner
from .speculation import DraftRunner, make_runner
from .store import set_workers

PATIENCE = timedelta(minutes=10)  # for the slowest step of the slowest process


@dataclass(frozen=True, slots=True)
class Share:
    """All that a process must know to run its part."""

    rank: int
    size: int
    port: int
    threads: int
    device: str
    dtype: torch.dtype
    directories: tuple[str, ...]  # of the model, and of a draft
    options: dict  # of `make_runner`

    def join(self, store: dist.TCPStore) -> dist.ProcessGroup:
        """Meet the others; returns when all are there."""
        torch.set_num_threads(self.threads)
        set_workers()
        backend = "nccl" if self.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        return dist.group.WORLD


class TeamRunner:
    """A runner whose plans are carried out by several processes."""

    def __init__(self, models: list[Transformer], share: Share, store: dist.TCPStore):
        """`models` are this process's own, whole: the model, and a draft that every process runs by itself."""
        self.broken: str | None = None
        self.workers = [_start(replace(share, rank=rank, device=_device(share, rank))) for rank in range(1, share.size)]
        self.close = weakref.finalize(self, _dismiss, self.workers)
        try:
            for rank, worker in enumerate(self.workers, 1):
                if not worker.stdout.readline():
                    raise RuntimeError(f"tensor_parallel: process {rank} of {share.size} could not load the model")
            self.runner = _runner(models, share, store)
        except BaseException:
            self.close()
            raise
        self.model = self.runner.model

    @property
    def alive(self) -> bool:
        """Whether all processes are there."""
        return self.broken is None and all(worker.poll() is None for worker in self.workers)

    def launch(self, plan: StepPlan) -> Flight:
        """Start computing a plan, everywhere."""
        try:
            if not self.alive:
                raise ConnectionError("not all processes are there")
            told = replace(plan, admitted=tuple(replace(each, grammar=None) for each in plan.admitted))
            message = pickle.dumps(told)
            for worker in self.workers:
                worker.stdin.write(message)
                worker.stdin.flush()
            return self.runner.launch(plan)
        except BaseException as error:  # whatever it was, the others are now a step ahead
            self.broken = self.broken or self._diagnosis()
            self.close()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(f"tensor_parallel: {self.broken}; make the LLM anew") from error

    def collect(self, flight: Flight):
        """Wait for a step, and report it."""
        return self.runner.collect(flight)

    def _diagnosis(self) -> str:
        for rank, worker in enumerate(self.workers, 1):
            try:  # when one dies, others notice in their exchange before its end is known
                code = worker.wait(1)
            except subprocess.TimeoutExpired:
                continue
            return f"process {rank} of {len(self.workers) + 1} has ended with exit code {code}"
        return "a step has failed"


def make_team(models: list[Transformer], directories: list, size: int, options: dict) -> TeamRunner:
    """Start the processes and give each its share of the model."""
    model = models[0]
    if not all(isinstance(place, (str, os.PathLike)) for place in directories):
        raise ValueError("tensor_parallel needs models in directories, which each process can read: use save_model")
    check(model.config, size)
    if dist.is_initialized():
        raise ValueError("tensor_parallel starts its own processes, but torch.distributed is in use here already")
    devices = torch.cuda.device_count()
    if model.device.type == "cuda" and devices < size:
        raise ValueError(f"tensor_parallel={size} needs as many GPUs, and torch sees {devices}")
    store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False, timeout=PATIENCE)
    threads = max(1, torch.get_num_threads() // size)
    places = tuple(os.path.abspath(place) for place in directories)
    dtype = model.embedding.weight.dtype
    return TeamRunner(models, Share(0, size, store.port, threads, str(model.device), dtype, places, options), store)


def _device(share: Share, rank: int) -> str:
    return f"cuda:{rank}" if share.device.startswith("cuda") else share.device


def _runner(models: list[Transformer], share: Share, store: dist.TCPStore) -> Runner | DraftRunner:
    group = share.join(store)
    return make_runner([shard(models[0], group), *models[1:]], **share.options)


def _start(share: Share) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(share.threads)}
    command = [sys.executable, "-m", __name__]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    pickle.dump(share, worker.stdin)
    worker.stdin.flush()
    return worker


def _dismiss(workers: list[subprocess.Popen]) -> None:
    """End the other processes; those that wait for a plan go by themselves, the rest after a moment."""
    for worker in workers:
        with contextlib.suppress(OSError):  # it has gone
            worker.stdin.close()
    for worker in workers:
        try:
            worker.wait(2)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdout.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def work() -> None:
    """What the other processes do: load, say so, and run plans until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first one's affair
    plans, ready = sys.stdin.buffer, sys.stdout
    share: Share = pickle.load(plans)
    models = [load_model(place, share.device, share.dtype)[0].eval() for place in share.directories]
    print("ready", file=ready, flush=True)
    store = dist.TCPStore("127.0.0.1", share.port, share.size, False, wait_for_workers=False, timeout=PATIENCE)
    runner = _runner(models, share, store)
    while True:
        try:
            plan = pickle.load(plans)
        except EOFError:
            os._exit(0)  # without the farewells of torch.distributed, for which nobody waits
        runner.launch(plan)


if __name__ == "__main__":
    work()
