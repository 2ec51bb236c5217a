"""One process of a run that is made and not trained: how many bytes that took, and the digest of the whole."""

import dataclasses
import hashlib
from pathlib import Path

from tests.processes import give_memory_back, join_run
from warploom.engine.memory import PeakMemory
from warploom.engine.training.distributed.sharded_state import full_weights
from warploom.engine.training.trainer import Trainer


def main(rank, size, port, config):
    join_run(rank, size, port)
    give_memory_back()
    small = {**config.model, "d_model": 32, "d_ff": 32, "n_layers": 1}
    Trainer(dataclasses.replace(config, out=f"{config.out}-warm", model=small), [])  # loads the libraries
    with PeakMemory("cpu") as peak:
        trainer = Trainer(config, [])
    Path(f"{config.out}-{rank}.bytes").write_text(str(peak.bytes))
    whole = dict(full_weights(trainer.state.shards, trainer.state.ema.best_weights()))
    if trainer.mesh.is_main:
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in whole.values()))
        Path(f"{config.out}.digest").write_text(digest.hexdigest())
