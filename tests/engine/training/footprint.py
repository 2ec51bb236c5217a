"""Of two processes, one predicts the memory of a run, the other takes it; each writes how many bytes."""

import dataclasses
from pathlib import Path

import torch

from tests.processes import give_memory_back
from warploom.engine.memory import PeakMemory
from warploom.engine.training.batch_size_finder import predict
from warploom.engine.training.trainer import Trainer


def main(rank, config):
    give_memory_back()
    torch.set_num_threads(1)
    warm = {**config.model, "d_model": 32, "n_layers": 1, "d_ff": 32, "max_seq_len": 16, "vocab_size": 64}
    small = dataclasses.replace(config, out=f"{config.out}-warm{rank}", model=warm, batch_size=4, grad_accum_steps=1)
    trainer = Trainer(small, [])  # loads the libraries
    trainer.one_step(trainer.loader.batch(0))
    out = f"{config.out}-{rank}"
    trainer = Trainer(dataclasses.replace(config, out=out), [])
    parts = trainer.config.grad_accum_steps
    if rank:
        with PeakMemory("cpu") as peak:
            for step in range(5):
                trainer.one_step(trainer.loader.batch(step))
        found = peak.bytes
    else:
        found = predict(trainer.state, trainer.loader, parts).peak(trainer.config.batch_size // parts)
    Path(f"{out}.bytes").write_text(str(found))
