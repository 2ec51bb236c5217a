"""One of the processes that torchrun starts with a mistake in their flags; what it says goes to a file."""

import os
import sys

from tests.processes import join_run
from warploom.engine.cli import main as command


def main(rank, port, out):
    join_run(rank, 2, port)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{out}{rank}.json"
    with open(f"{out}{rank}.said", "w") as sys.stderr:
        sys.exit(command(["train", "stdlib", f"--out={out}", "--tp=3", "--device=cpu"]))
