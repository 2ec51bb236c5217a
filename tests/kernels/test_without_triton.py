"""Where triton is not installed, everything imports and runs in eager PyTorch, and says what is missing when asked."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from warploom import kernels
from warploom.kernels.verify import call

for op in kernels.ops():
    for case in op.cases:
        if not case.bench:
            call(op, case, op, kernels.Maker(torch.float32))
try:
    with kernels.backend("triton"):
        kernels.rms_norm(torch.ones(2, 4), torch.ones(4))
except ValueError as error:
    print(error)
"""


def test_every_op_runs_and_the_triton_backend_says_what_is_missing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'backend is "triton", but triton is not installed; valid here are auto and eager'
