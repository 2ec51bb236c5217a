"""One process of a generation that torchrun starts: in the first, one process dies; in the second, one is late."""

import os
import signal
import time

import torch
import torch.distributed as dist

from tests.processes import join_run
from warploom.engine.training.distributed.rendezvous import join


def main(rank, port, doomed):
    join_run(rank, 2, port)
    if doomed is None and rank == 0:
        time.sleep(0.5)  # long enough for the other to read what the dead have left
    join("gloo")
    number = torch.ones(())
    dist.all_reduce(number)
    if rank == doomed:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(number)
    assert number == 4
