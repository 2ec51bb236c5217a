"""The whole loom in a few minutes: corpus → tokenizer → training → samples → a model directory to talk to.

The corpus is the Python standard library of the interpreter that runs this: real text of tens of megabytes that every
machine already has. Files, not lines, are split between training and validation, so nothing leaks. What comes out is
a small Llama that completes Python, in a directory that `transformers` opens too.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from . import available

if TYPE_CHECKING:
    from ...tokenizer.base import Tokenizer

TEMPERATURES = (0.0, 0.5, 0.8, 1.1)


@dataclass(frozen=True)
class Size:
    """Model and budget of a `--size`."""

    preset: str
    minutes: float
    batch_size: int
    lr: float


SIZES = {
    "tiny": Size("llama-tiny", 3.5, 16, 1e-2),
    "small": Size("llama-15m", 30.0, 32, 5e-3),
    "moe": Size("moe-tiny", 5.0, 16, 1e-2),
}


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="warploom demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="what to train (default: tiny, under five minutes on two cores)"
    )
    parser.add_argument("--out", default="runs/demo", help="where the model goes (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the size's minutes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (default: 0)")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps must be at least 1, not {options.steps}")

    from ..training import TrainConfig, train
    from .train import callback

    size = SIZES[options.size]
    config = TrainConfig(
        data="stdlib", out=options.out, overwrite=True, preset=size.preset, optimizer="muon", lr=size.lr,
        batch_size=size.batch_size, steps=options.steps, minutes=None if options.steps else size.minutes,
        seed=options.seed, save_every=0, sample_tokens=0,
    )  # fmt: skip
    result = train(config, [callback()])
    if result.evaluation is not None:
        print(f"\nheld-out text after {result.steps} steps: {result.evaluation}")
    show_samples(result.directory, options.seed)
    print(farewell(result.directory))
    return 130 if result.stopped_by else 0


def show_samples(directory: Path, seed: int) -> None:
    """Completions of prompts at several temperatures, by the saved model: what anyone who loads it will see."""
    from ..formats.model_directory import load_model
    from ..generation import generate

    model, tokenizer = load_model(directory)
    for prompt in held_out_prompts(directory / "data", tokenizer):
        print(f"\n{'─' * 20} prompt: {prompt!r}")
        for temperature in TEMPERATURES:
            stream = tokenizer.stream()
            tokens = generate(model, tokenizer.encode(prompt), 48, temperature=temperature, seed=seed)
            print(f"\n[temperature {temperature}]\n{prompt}", end="")
            for token in tokens:
                print(stream.push(token), end="", flush=True)
            print(stream.finish())


def held_out_prompts(data: Path, tokenizer: Tokenizer, count: int = 3) -> list[str]:
    """Heads of functions and classes from the validation text, which the model has never seen."""
    from ..data import TokenData

    text = tokenizer.decode(TokenData(data).split("val").tokens[:100_000].tolist())
    heads = re.findall(r"^(?:def|class) [^\n]*:\n", text, flags=re.MULTILINE)
    return heads[:: max(1, len(heads) // count)][:count] or [text[:40]]


def farewell(directory: Path) -> str:
    lines = [f"the model is in {directory} (loss curve: {directory / 'loss.png'}). Now:"]
    verbs = {
        "generate": f'warploom generate --model {directory} --prompt "def read_file("',
        "chat": f"warploom chat --model {directory}",
        "serve": f"warploom serve --model {directory}",
        "inspect": f"warploom inspect model {directory}",
    }
    lines += [f"  {command}" for verb, command in verbs.items() if verb in available()]
    return "\n" + "\n".join(lines)
