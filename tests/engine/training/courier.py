"""One of two processes that train a step: how many gradients were still missing when each bucket left."""

import json
import os
from pathlib import Path

os.environ.update({"RANK": str(RANK), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)})  # noqa: F821
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"

from warploom.engine.training.distributed import grad_buckets as exchange
from warploom.engine.training.trainer import Trainer

exchange.BUCKET = 4000
trainer = Trainer(CONFIG, [])  # noqa: F821
send, missing = exchange.GradReducer._launch_bucket, []


def watch(self):
    missing.append(sum(bucket.missing for bucket in self.buckets))
    send(self)


exchange.GradReducer._launch_bucket = watch
trainer.one_step(trainer.loader.batch(0))
Path(f"{CONFIG.out}-{RANK}.json").write_text(json.dumps([missing, len(trainer.reducer.buckets)]))  # noqa: F821
