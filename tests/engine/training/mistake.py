"""One of the processes that torchrun starts with a mistake in their flags; what it says goes to a file."""

import os
import sys

os.environ |= {"RANK": str(RANK), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}  # noqa: F821
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": f"{OUT}{RANK}.json"}  # noqa: F821

from warploom.engine.cli import main

with open(f"{OUT}{RANK}.said", "w") as sys.stderr:  # noqa: F821
    sys.exit(main(["train", "stdlib", f"--out={OUT}", "--tp=3", "--device=cpu"]))  # noqa: F821
