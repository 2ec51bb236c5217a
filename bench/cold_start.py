"""Cold-start benchmark: from process start to the first token.

Each contestant is a short program, run in a new process every round: it loads the model directory and generates one
token. The row is the time from the start of the process; `loaded_seconds` is the part of it after the interpreter's
large imports (torch), which is what somebody pays who already has them: `LLM(…)` to the first token. Files are in the
system's cache, as after a first start.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from . import peers
from .harness import Machine
from .random_model import printable_tokenizer, save_random
from .schema import Row

OURS = """
import torch
begin = clock()
from warploom.engine.serving import LLM, SamplingParams
llm = LLM(directory, dtype=dtype, device=device, quantize=quantize)
llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
"""
BEFORE = """
import json, sys, time
clock = begin = time.monotonic
directory, dtype, device, quantize, prompt = json.loads(sys.argv[1])
"""
AFTER = """
peak = next((line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), 0)
print(clock() - begin, 1024 * int(peak), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Start:
    """Process in which every contestant starts."""

    directory: Path
    dtype: str
    device: str
    quantize: str | None
    prompt: tuple[int, ...]

    def run(self, program: str, notes: dict[str, list[float]]) -> None:
        """Run a program until it reports its first token."""
        values = str(self.directory), self.dtype, self.device, self.quantize, self.prompt
        said, after = _first_line([sys.executable, "-c", BEFORE + program + AFTER, json.dumps(values)])
        if not said:
            raise RuntimeError((after.strip().splitlines() or ["it ended without a word"])[-1])
        for name, value in zip(("loaded_seconds", "peak_bytes"), said.split()):
            notes.setdefault(name, []).append(float(value))


def measure(
    machine: Machine, preset: str, dtype: str, quantize: str | None = None, rivals: bool = True, **overrides: int
) -> list[Row]:
    """Measure ours, from Python and the command line, and every peer that can load the same weights."""
    from ..engine.config import ModelConfig

    config = ModelConfig.preset(preset, **overrides)
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_random(config, dtype, machine.device, directory, printable_tokenizer(config))
        start = Start(directory, dtype, machine.device, quantize, tuple(range(33, 49)))
        programs = {"ours": OURS} | (peers.build("cold_start", start) if rivals else {})
        notes: dict[str, Any] = {who: {} for who in programs}
        calls: dict[str, Callable[[], object] | peers.Missing] = {
            who: program if isinstance(program, peers.Missing) else partial(start.run, program, notes[who])
            for who, program in programs.items()
        }
        calls["ours generate"] = partial(_by_hand, start)
        case = f"{preset if not overrides else 'llama'} {quantize or dtype}, process start → first token"
        rows = machine.with_wall_clock().compare(case, calls, unit="start", warmup=1, least=min(3, machine.rounds))
    for row in rows:
        row.extra.pop("first_seconds", None)
        row.extra.update({name: median(values[1:]) for name, values in notes.get(row.who, {}).items() if values[1:]})
    return rows


def _by_hand(start: Start) -> None:
    """Run `warploom generate` until its first output."""
    command = [sys.executable, "-m", f"{__package__.rpartition('.')[0]}.engine.cli", "generate"]
    command += ["--model", str(start.directory), "--prompt", "hello", "--max-tokens", "1", "--temperature", "0"]
    command += ["--dtype", start.dtype, "--device", start.device, "--ignore-eos"]
    command += ["--quantize", start.quantize] if start.quantize else []
    said, after = _first_line(command)
    if not said:
        raise RuntimeError((after.strip().splitlines() or ["it showed nothing"])[-1])


def _first_line(command: list[str]) -> tuple[str, str]:
    """Run a command; return its first line of output, else its error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stdout.readline()
        errors = "" if line else process.stderr.read()
        process.kill()
    return line, errors
