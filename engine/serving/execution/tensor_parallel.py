"""Tensor-parallel serving: one model sharded over several processes.

The main process has the scheduler, the engine and its callers. It starts the workers; once they have joined the process
group, each reads its shard of the weights, so a model may be larger than the memory of any of them. From then on it
sends each worker the plan that it gives its own runner, a few hundred bytes a step. All run that plan on their heads
and features (engine/parallel/tensor_parallel.py), in pages of the same numbers, with collectives inside the model; each
has the full logits, and sampling depends on (seed, position) alone, so all choose the same tokens and send nothing
back.

A process that dies ends the service: the current step fails, and so does every later one, with a sentence that says
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

from ...errors import InputError
from ...formats.model_directory import read_model
from ...formats.model_info import load_config
from ...model import Transformer
from ...parallel.tensor_parallel import check
from ..scheduling.step import StepPlan
from .kv_cache import set_threads
from .model_runner import InFlightStep, memory_for_pages
from .speculative import make_runner

PATIENCE = timedelta(minutes=10)  # for the slowest step of the slowest process


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a worker process needs to start."""

    rank: int
    size: int
    port: int
    threads: int
    device: str
    dtype: str | torch.dtype | None
    directories: tuple[str, ...]  # directories of the model, and of a draft, which every process runs whole
    packed: bool  # whether packed weights stay so: rounded anew, they are read as floats
    largest: tuple[int, int]  # tokens of a step, sequences of a batch

    def join(self, store: dist.TCPStore) -> dist.ProcessGroup:
        """Join the process group; returns when all have joined."""
        torch.set_num_threads(self.threads)
        set_threads()
        backend = "nccl" if self.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        return dist.group.WORLD


class TPRunner:
    """Runner that broadcasts its plans to worker processes.

    A `with` block around these three ends the processes if something goes wrong inside."""

    def __init__(self, share: WorkerSpec, store: dist.TCPStore):
        self.broken: str | None = None
        self.workers = [_start(replace(share, rank=rank, device=_device(share, rank))) for rank in range(1, share.size)]
        self.close = weakref.finalize(self, _stop_workers, self.workers)
        with self:
            self._recv("start")
            self.group = share.join(store)

    def __enter__(self) -> "TPRunner":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None:
            self.close()

    def memory_for_pages(self, model: Transformer, *largest: int) -> int:
        """Bytes for the KV cache over all processes, by the one with the least; `model` is this process's shard."""
        self._recv("load the model")
        mine = memory_for_pages(model, *largest)  # on GPUs a step of all processes
        least = min(mine, *map(int, self._recv("make its largest step")))
        return least if model.device.type == "cpu" else least * self.group.size()  # a CPU's memory is the same for all

    def begin(self, models: list[Transformer], options: dict) -> "TPRunner":
        """Create the runners in all processes, with these options of `make_runner`."""
        self._broadcast(options)
        self.runner = make_runner(models, **options)
        self.model = self.runner.model
        return self

    @property
    def alive(self) -> bool:
        """Return whether all processes are alive."""
        return self.broken is None and all(worker.poll() is None for worker in self.workers)

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Start running a plan, in all processes."""
        try:
            if not self.alive:
                raise ConnectionError("not all processes are there")
            told = replace(plan, admitted=tuple(replace(each, grammar=None) for each in plan.admitted))
            self._broadcast(told)
            return self.runner.launch(plan)
        except BaseException as error:  # whatever it was, the others are now a step ahead
            self.broken = self.broken or self._diagnosis()
            self.close()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(f"tensor_parallel: {self.broken}; make the LLM anew") from error

    def collect(self, flight: InFlightStep):
        """Wait for a step and return its result."""
        return self.runner.collect(flight)

    def _broadcast(self, told: object) -> None:
        message = pickle.dumps(told)
        for worker in self.workers:
            worker.stdin.write(message)
            worker.stdin.flush()

    def _recv(self, task: str) -> list[bytes]:
        """Receive one message from every worker, each the acknowledgement of a task."""
        said = [worker.stdout.readline() for worker in self.workers]
        if not all(said):
            silent = said.index(b"") + 1
            raise RuntimeError(f"tensor_parallel: process {silent} of {len(said) + 1} could not {task}")
        return said

    def _diagnosis(self) -> str:
        for rank, worker in enumerate(self.workers, 1):
            try:  # when one dies, others notice in their exchange before its end is known
                code = worker.wait(1)
            except subprocess.TimeoutExpired:
                continue
            return f"process {rank} of {len(self.workers) + 1} has ended with exit code {code}"
        return "a step has failed"


def start_workers(
    directories: list, size: int, device: torch.device, dtype: str | torch.dtype | None, packed: bool, *largest: int
) -> TPRunner:
    """Start the processes that share a model; each also runs a whole draft, if a second directory is given."""
    if not all(isinstance(place, (str, os.PathLike)) for place in directories):
        raise InputError("tensor_parallel needs models in directories, which each process can read: use save_model")
    check(load_config(directories[0]), size)
    if dist.is_initialized():
        raise InputError("tensor_parallel starts its own processes, but torch.distributed is in use here already")
    devices = torch.cuda.device_count()
    if device.type == "cuda" and devices < size:
        raise InputError(f"tensor_parallel={size} needs as many GPUs, and torch sees {devices}")
    store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False, timeout=PATIENCE)
    threads = max(1, torch.get_num_threads() // size)
    places = tuple(os.path.abspath(place) for place in directories)
    return TPRunner(WorkerSpec(0, size, store.port, threads, str(device), dtype, places, packed, largest), store)


def _device(share: WorkerSpec, rank: int) -> str:
    return f"cuda:{rank}" if share.device.startswith("cuda") else share.device


def _start(share: WorkerSpec) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(share.threads)}
    command = [sys.executable, "-m", __name__]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    pickle.dump(share, worker.stdin)
    worker.stdin.flush()
    return worker


def _stop_workers(workers: list[subprocess.Popen]) -> None:
    """Shut the workers down: idle ones exit by themselves, the others are killed after a moment."""
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


def worker_main() -> None:
    """Entry point of a worker: join, load its shard, run plans until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first one's affair
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints (NCCL_DEBUG, for one) is not said to the first process
    share: WorkerSpec = _receive()
    store = dist.TCPStore("127.0.0.1", share.port, share.size, False, wait_for_workers=False, timeout=PATIENCE)
    print("here", file=said, flush=True)
    group = share.join(store)
    place, *drafts = share.directories
    try:
        models = [read_model(place, share.device, share.dtype, group, share.packed)]
        models += [read_model(draft, share.device, models[0].embedding.weight.dtype) for draft in drafts]
    except InputError:
        os._exit(1)  # the first process reads the same files, and says what is wrong
    print("loaded", file=said, flush=True)
    print(memory_for_pages(models[0], *share.largest), file=said, flush=True)
    runner = make_runner(models, **_receive())
    while True:
        runner.launch(_receive())


def _receive():
    try:
        return pickle.load(sys.stdin.buffer)
    except EOFError:
        os._exit(0)  # skip torch.distributed's shutdown: the main process has gone


if __name__ == "__main__":
    worker_main()
