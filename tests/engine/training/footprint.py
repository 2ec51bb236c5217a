"""Of two processes, one predicts the memory of a run, the other takes it; each writes how many bytes.

Both ask the C library to give every freed tensor back to the system. The gaps that it leaves otherwise are as real, but
differ by a tenth and more from one run to the next of the same program.
"""

import ctypes
import dataclasses
from pathlib import Path

import torch

from warploom.engine.memory import PeakMemory
from warploom.engine.training.batch_size_finder import predict
from warploom.engine.training.trainer import Trainer

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD):
    ctypes.CDLL(None).mallopt(setting, 1 << 16)
torch.set_num_threads(1)
warm = {**CONFIG.model, "d_model": 32, "n_layers": 1, "d_ff": 32, "max_seq_len": 16, "vocab_size": 64}  # noqa: F821
small = dataclasses.replace(CONFIG, out=f"{CONFIG.out}-warm{RANK}", model=warm, batch_size=4, grad_accum_steps=1)  # noqa: F821
trainer = Trainer(small, [])  # loads the libraries
trainer.one_step(trainer.loader.batch(0))
out = f"{CONFIG.out}-{RANK}"  # noqa: F821
trainer = Trainer(dataclasses.replace(CONFIG, out=out), [])  # noqa: F821
parts = trainer.config.grad_accum_steps
if RANK:  # noqa: F821
    with PeakMemory("cpu") as peak:
        for step in range(5):
            trainer.one_step(trainer.loader.batch(step))
    found = peak.bytes
else:
    found = predict(trainer.state, trainer.loader, parts).peak(trainer.config.batch_size // parts)
Path(f"{out}.bytes").write_text(str(found))
