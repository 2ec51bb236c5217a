"""One process of a run that is made and not trained: how many bytes that took, and the digest of the whole.

The C library is asked to give freed tensors back to the system, as it does by itself with those of a large model.
"""

import ctypes
import dataclasses
import hashlib
import os
from pathlib import Path

os.environ.update({"RANK": str(RANK), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)})  # noqa: F821
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"

from warploom.engine.memory import PeakMemory
from warploom.engine.training.distributed.sharded_state import full_weights
from warploom.engine.training.trainer import Trainer

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD):
    ctypes.CDLL(None).mallopt(setting, 1 << 16)
small = {**CONFIG.model, "d_model": 32, "d_ff": 32, "n_layers": 1}  # noqa: F821
Trainer(dataclasses.replace(CONFIG, out=f"{CONFIG.out}-warm", model=small), [])  # loads the libraries  # noqa: F821
with PeakMemory("cpu") as peak:
    trainer = Trainer(CONFIG, [])  # noqa: F821
Path(f"{CONFIG.out}-{RANK}.bytes").write_text(str(peak.bytes))  # noqa: F821
whole = dict(full_weights(trainer.state.shards, trainer.state.ema.best_weights()))
if trainer.mesh.is_main:
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in whole.values()))
    Path(f"{CONFIG.out}.digest").write_text(digest.hexdigest())  # noqa: F821
