"""One of two processes that train a step: how many gradients were still missing when each bucket left."""

import json
from pathlib import Path

from tests.processes import join_run
from warploom.engine.training.distributed import grad_buckets as exchange
from warploom.engine.training.trainer import Trainer


def main(rank, port, config):
    join_run(rank, 2, port)
    exchange.BUCKET = 4000
    trainer = Trainer(config, [])
    send, missing = exchange.GradReducer._launch_bucket, []

    def watch(self):
        missing.append(sum(bucket.missing for bucket in self.buckets))
        send(self)

    exchange.GradReducer._launch_bucket = watch
    trainer.one_step(trainer.loader.batch(0))
    Path(f"{config.out}-{rank}.json").write_text(json.dumps([missing, len(trainer.reducer.buckets)]))
