"""One process of a run: what torchrun would start, without the seconds it takes to start it."""

import os

os.environ.update({"RANK": str(RANK), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)})  # noqa: F821
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"

from warploom.engine.training import train

train(CONFIG)  # noqa: F821
