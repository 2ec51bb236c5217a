"""Where triton is not installed, everything imports and runs in eager PyTorch, and says what is missing when asked."""

import os
import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from warploom import kernels
from warploom.kernels.tools.verify import call

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


def test_every_op_runs_without_triton():
    """Every op runs and the triton backend says what is missing."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'backend is "triton", but triton is not installed; valid here are auto and eager'


STARTED = """
import sys, torch
from warploom.engine import LLM, ModelConfig, SamplingParams, Transformer

llm = LLM(Transformer(ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2)))
assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2
if not torch.cuda.device_count():
    print(*sorted({"triton", "torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""


def test_a_first_token_on_a_cpu_waits_for_no_compiler():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": ""}
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
