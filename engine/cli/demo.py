"""`warploom demo`: the whole pipeline in a few minutes, from corpus and tokenizer to a model to chat with.

The corpus is the Python standard library of the interpreter that runs this: real text of tens of megabytes that every
machine already has. Files, not lines, are split between training and validation, so nothing leaks. What comes out is
a small Llama that completes Python, in a directory that `transformers` opens too.

With `--chat` it learns to converse instead: first the next token of what people have written to each other, whoever
wrote it (pretraining), then only what the second of them answered (instruction tuning). Some conversations are kept
from both, to measure on.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import available
from .flag_errors import Parser

if TYPE_CHECKING:
    from ...tokenizer.base import Tokenizer
    from ..training import TrainResult

TEMPERATURES = (0.0, 0.5, 0.8, 1.1)
LINES = (
    "Hi! How are you doing today?",
    "What do you like to do for fun?",
    "Do you have any pets?",
    "Nice talking to you!",
)
FIRST = 0.6  # of the time of --chat, for the base


@dataclass(frozen=True)
class Size:
    """Model and budget of a demo `--size`."""

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
    parser = Parser(prog="warploom demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="what to train (default: tiny, under five minutes on two cores)"
    )
    parser.add_argument("--chat", action="store_true", help="learn to converse, from conversations of people")
    parser.add_argument("--out", default="runs/demo", help="where the model goes (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the size's minutes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (default: 0)")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps must be at least 1, not {options.steps}")

    if options.chat:
        return learn_to_converse(options)
    result = _train(options, "stdlib", options.out)
    if result.evaluation is not None:
        print(f"\nheld-out text after {result.steps} steps: {result.evaluation}")
    show_samples(result.directory, options.seed)
    print(farewell(result.directory))
    return 130 if result.stopped_by else 0


def _train(options: argparse.Namespace, data: str, out: str, share: float = 1.0, **changes: Any) -> TrainResult:
    from ..training import TrainConfig, train
    from .train import callback

    size = SIZES[options.size]
    budget = {"steps": options.steps} if options.steps else {"minutes": size.minutes * share}
    settings = {
        "preset": size.preset, "optimizer": "muon", "lr": size.lr, "batch_size": size.batch_size, "seed": options.seed,
        "save_every": 0, "sample_tokens": 0, "overwrite": True,
    }  # fmt: skip
    return train(TrainConfig(data=data, out=out, **{**settings, **budget, **changes}), [callback()])


def learn_to_converse(options: argparse.Namespace) -> int:
    """Train a base on people's conversations, fine-tune it on the answers, and show a conversation unedited."""
    out = Path(options.out)
    texts, chats = write_conversations(out / "conversations")
    base = _train(options, str(texts), str(out / "base"), FIRST)
    if base.stopped_by:
        return 130
    changes = {"init_from": str(base.directory), "lr": SIZES[options.size].lr / 4, "eval_batches": 0}
    result = _train(options, str(chats), options.out, 1 - FIRST, **changes)
    if result.evaluation is not None:
        print(f"\nheld-out answers after {base.steps} and {result.steps} steps: {result.evaluation}\n")
    show_conversation(result.directory, options.seed)
    print(farewell(result.directory, completes=False))
    return 130 if result.stopped_by else 0


def write_conversations(folder: Path) -> tuple[Path, Path]:
    """Write the base's texts and the conversations to tune on; the held-out part of these is in no text."""
    from ...tokenizer.chat import render
    from ..data.chitchat import chitchat
    from ..data.conversations import place_of
    from ..training import TrainConfig

    folder.mkdir(parents=True, exist_ok=True)
    texts, chats = folder / "texts.jsonl", folder / "chats.jsonl"
    with open(texts, "w", encoding="utf-8") as plain, open(chats, "w", encoding="utf-8") as rows:
        for messages in chitchat():
            rows.write(json.dumps({"messages": messages}) + "\n")
            if place_of(messages) < TrainConfig.splits[0]:
                plain.write(json.dumps({"text": render(None, messages, {})}) + "\n")
    return texts, chats


def show_conversation(directory: Path, seed: int) -> None:
    """Show a short exchange with the saved model."""
    from ..serving import LLM, SamplingParams

    llm, messages = LLM(directory), []
    params = SamplingParams(max_tokens=48, temperature=0.7, top_p=0.9, seed=seed)
    for line in LINES:
        messages.append({"role": "user", "content": line})
        while len(llm.encode_chat(messages)) + params.max_tokens > llm.max_seq_len:
            del messages[:2]  # the oldest is forgotten
        said = llm.chat(messages, params).text.strip()
        messages.append({"role": "assistant", "content": said or "…"})
        print(f"you:   {line}\nmodel: {said}")
    llm.close()


def show_samples(directory: Path, seed: int) -> None:
    """Show completions by the saved model at several temperatures."""
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
    """First lines of functions and classes from the validation text, unseen in training."""
    from ..data import TokenData

    text = tokenizer.decode(TokenData(data).split("val").tokens[:100_000].tolist())
    heads = re.findall(r"^(?:def|class) [^\n]*:\n", text, flags=re.MULTILINE)
    return heads[:: max(1, len(heads) // count)][:count] or [text[:40]]


def farewell(directory: Path, completes: bool = True) -> str:
    lines = [f"the model is in {directory} (loss curve: {directory / 'loss.png'}). Now:"]
    verbs = {
        "generate": f'warploom generate {directory} --prompt "def read_file("',
        "chat": f"warploom chat {directory}",
        "serve": f"warploom serve {directory}",
        "inspect": f"warploom inspect model {directory}",
    }
    if not completes:
        del verbs["generate"]
    lines += [f"  {command}" for verb, command in verbs.items() if verb in available()]
    return "\n" + "\n".join(lines)
