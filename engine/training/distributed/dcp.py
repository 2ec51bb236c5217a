"""Distributed checkpoints (PyTorch DCP): every process writes its blocks; any process mesh can read them.

PyTorch's distributed checkpoint does the work. Processes tell each other which blocks they have; of a block that
several have, one writes. Files are safetensors, whose headers say where in the whole each block lies, so a reader asks
for the blocks of its own grid, whatever grid wrote them, and nothing has to be unpickled. It all happens in the thread
of `Checkpoints`, on copies, with a process group of its own: the words of two threads must not mix.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ...data.tokens import file_hash
from ...errors import InputError

FOLDER = "shards"


class ShardWriter:
    """Writer of this process's blocks into a distributed checkpoint."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def write(self, blocks: dict[str, Tensor], directory: Path) -> dict[str, str]:
        """Write collectively; return the hash of each file by name once all processes have written."""
        import torch.distributed.checkpoint as dcp

        folder = directory / FOLDER
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(blocks, storage_writer=writer, process_group=self.group)
        except dcp.CheckpointException as failure:  # the same in every process, whoever it befell
            raise next(error for error, _ in failure.failures.values()) from failure
        own = {f"{FOLDER}/{path.name}": file_hash(path) for path in folder.glob(f"shard-{dist.get_rank() + 1:05}-*")}
        hashes: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(hashes, own, group=self.group)
        found = {name: digest for some in hashes for name, digest in some.items()}
        missing = [name for name in found if not (directory / name).exists()]
        if missing and dist.get_rank() == 0:  # only rank 0 can check: it may have renamed the folder by now
            raise InputError(f"{missing[0]} was written on another machine: all must see one and the same folder")
        return found


def read_shards(directory: Path, blocks: dict[str, Tensor]) -> None:
    """Fill this process's blocks in place from shards written by any number of processes."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")  # each reads alone what it needs: so be it
        dcp.load(blocks, storage_reader=dcp.HuggingFaceStorageReader(str(directory / FOLDER)), no_dist=True)
