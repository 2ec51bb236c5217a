"""One process of a generation that torchrun starts: in the first, one process dies; in the second, one is late."""

import os
import signal
import time

import torch
import torch.distributed as dist

from warploom.engine.training.distributed.rendezvous import join

os.environ |= {"RANK": str(RANK), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}  # noqa: F821
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
if DOOMED is None and RANK == 0:  # noqa: F821
    time.sleep(0.5)  # long enough for the other to read what the dead have left
join("gloo")
number = torch.ones(())
dist.all_reduce(number)
if RANK == DOOMED:  # noqa: F821
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(number)
assert number == 4
