"""Rendezvous: forming the process group, also after torchrun restarted killed processes.

`torchrun` keeps one key-value store for as long as it lives, and processes leave their addresses in it. When one dies,
torchrun ends the others and starts all of them anew, with the same store: a process that reads a peer's address before
the new peer has written its own gets the address of the dead one, and waits for it. So every generation of processes
first agrees on a number that no other has had, and keeps its addresses under it. Nor can that number simply be read
from the store, for the same reason. Instead each process asks under a name that nobody has used before:

    process r   here/r = a fresh word                  got/number/r = yes
    leader                     answer/that word = number

The leader repeats its answer until it sees that everyone has got it: it may have answered a dead process first.
"""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist

_times = 0  # groups that this process has joined: it may train several models in turn


def join(backend: str) -> bool:
    """Join torchrun's process group; return whether this is a restart."""
    global _times
    _times += 1
    store, rank, size = next(dist.rendezvous("env://"))
    number = _lead(store, size) if rank == 0 else _follow(store, rank)
    dist.init_process_group(backend, store=dist.PrefixStore(f"generation/{number}", store), rank=rank, world_size=size)
    return number > _times


def _lead(store: dist.Store, size: int) -> int:
    number = store.add("generations", 1)
    missing = set(range(1, size))
    while missing:
        for rank in missing:
            if store.check([f"here/{rank}"]):
                store.set(f"answer/{store.get(f'here/{rank}').decode()}", str(number))
        missing = {rank for rank in missing if not store.check([f"got/{number}/{rank}"])}
        time.sleep(0.01)
    return number


def _follow(store: dist.Store, rank: int) -> int:
    word = uuid.uuid4().hex
    store.set(f"here/{rank}", word)
    number = int(store.get(f"answer/{word}"))  # waits for it
    store.set(f"got/{number}/{rank}", "yes")
    return number
