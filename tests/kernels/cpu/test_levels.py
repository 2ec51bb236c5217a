"""The CPU engine for every size of registers: which module is loaded, and that each computes the same to rounding."""

import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from warploom.kernels.cpu import extension

CODE = """
import json, torch
from warploom import LLM, ModelConfig, SamplingParams, Transformer
from warploom.kernels.cpu.extension import native
torch.manual_seed(0)
model = Transformer(ModelConfig(vocab_size=90, d_model=64, n_layers=2, n_heads=2, max_seq_len=128))
tokens = torch.randint(0, 90, (2, 100), generator=torch.Generator().manual_seed(1))
loss = model.loss(tokens, tokens.roll(-1, 1))
loss.backward()
shown = [loss.item(), *(p.grad.norm().item() for p in model.parameters())]
for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}):
    llm = LLM(model, device="cpu", **options)
    for output in llm.generate(tokens.tolist(), SamplingParams(max_tokens=1, temperature=0, logprobs=1)):
        shown.append(output.logprobs[0].logprob)
print(json.dumps([native.instruction_set(), shown]))
"""
LEVELS = {"avx512": ("_native_avx512", "avx512"), "avx2": ("_native_avx2", "avx2"), "default": ("_native", "sse2")}


def test_unbuilt_level_falls_to_the_next(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def fail(name, package):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(extension, "import_module", fail)
    with pytest.raises(ImportError, match=r"no \.\.\._native_avx512; no \.\.\._native_avx2; no \.\.\._native"):
        extension.import_native()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one level on this CPU")
def test_levels_agree_to_rounding():
    """ATEN_CPU_CAPABILITY limits both engines: a machine with AVX-512 shows what one without computes."""
    results = {}
    for capability, (module, name) in LEVELS.items():
        if find_spec(f"warploom.{module}") is None:
            continue
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        shown = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
        assert shown.returncode == 0, shown.stderr[-2000:]
        found, numbers = json.loads(shown.stdout)
        if found.startswith(name):  # else this CPU is without
            results[capability] = torch.tensor(numbers)
    if len(results) < 2:
        pytest.skip("one level is built (WARPLOOM_LEVELS)")
    first, *others = results.values()
    exact = len(first) - 6  # the last six are of bfloat16, 8 and 4 bits, where a rounding may fall to the other side
    for other in others:
        assert torch.allclose(first[:exact], other[:exact], rtol=1e-5, atol=1e-5)
        assert torch.allclose(first, other, rtol=0, atol=0.03)
