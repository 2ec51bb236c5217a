"""The processes of one run, as torchrun would start them, without the seconds that it takes."""

import ctypes
import dataclasses
import multiprocessing
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h


def join_run(rank, size, port):
    """Set what torchrun tells a process; the store at `port` is the test's, as it is torchrun's elsewhere."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


def run_processes(main, count=2, **given):
    """Call `main(rank, …)` in `count` processes at once; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["warploom.engine.training.trainer", "warploom.tokenizer", "warploom.engine.formats.model_writer"]
    )
    team = [context.Process(target=main, args=(rank,), kwargs=given) for rank in range(count)]
    try:
        for process in team:
            process.start()
        for process in team:
            process.join()
        return [process.exitcode for process in team]
    finally:  # whatever ended the test, none goes on beside the next
        for process in team:
            process.kill()


def kill(context, whole, kills, least=1, **given):
    """Kill a twin of a run, and let it finish; returns its config. On a busy machine one may end before it is hit."""
    from warploom.bench.kills import run_killed

    for attempt in range(4):
        twin = dataclasses.replace(whole, out=whole.out.replace("whole", f"killed-{attempt}"))
        if len(run_killed(context, twin, kills, **given)) >= least:
            return twin
    raise AssertionError(f"no run was killed {least} times")


def give_memory_back():
    """Have the C library return freed tensors to the system at once, as it does by itself with those of a large model.

    The gaps that it leaves otherwise are as real, but differ by a tenth and more from one run of a program to the next.
    """
    for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(setting, 1 << 16)
