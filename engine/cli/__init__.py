"""Command line `warploom VERB`: one file a verb, imported only when called.

`warploom --help` prints the table below and imports nothing else, so it answers at once. A verb is a module of this
folder with `run(argv) -> exit code`; its flags are the fields of a dataclass, read by tyro.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec

from ...tokenizer.cpus import available_cpus
from ..errors import InputError, describe_error

VERBS = {
    "demo": "the whole pipeline in a few minutes: corpus, tokenizer, training, samples",
    "data": "tokenize text to token files",
    "tokenizer": "train a tokenizer; encode, decode, show",
    "train": "pretrain or fine-tune (LoRA, DPO) from token files, text or conversations",
    "rl": "reinforcement learning (GRPO) from a reward function or task",
    "eval": "loss, perplexity and bits per byte; accuracy at a task",
    "generate": "continue a prompt, or a file of prompts",
    "chat": "talk to a model in the terminal",
    "serve": "HTTP server and playground page",
    "ladder": "ablation from a bare MLP to a MoE Llama, one idea a rung",
    "inspect": "show a model's sizes, a text's tokens, attention maps, training data",
    "bench": "measure against peers and the machine's limits",
    "quantize": "quantize a model to 8 or 4 bits, calibrated on a text (GPTQ)",
    "export": "write a model for other tools",
    "doctor": "report of this machine: device, backends, missing packages",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. User errors are one line on stderr and exit 2 (WARPLOOM_DEBUG=1: a traceback); Ctrl-C exits 130."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output (head, less) has left; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version" or argv[1:] == ["--version"]:
        return _print_version()
    verb, rest = argv[0], argv[1:]
    if (cpus := available_cpus()) < (os.cpu_count() or 1):  # torch counts a container's processors, not its quota
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))
    if verb not in available():
        print(f"warploom: {verb!r} is not a verb; choose one of: {', '.join(available())}", file=sys.stderr)
        return 2
    try:
        return import_module(f".{verb}", __name__).run(rest) or 0
    except KeyboardInterrupt:
        print("\nwarploom: interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        told = describe_error(error)
        if told is None or os.environ.get("WARPLOOM_DEBUG"):
            raise
        print(f"warploom {verb}: {' '.join(told.split())}", file=sys.stderr)
        return 2


def available() -> dict[str, str]:
    """Available verbs with their help."""
    return {verb: does for verb, does in VERBS.items() if find_spec(f"{__name__}.{verb}")}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {does}" for verb, does in available().items()]
    head = ["warploom: train language models from raw text, and serve them", "", "usage: warploom VERB [flags]", ""]
    return "\n".join([*head, *lines, "", "warploom VERB --help explains a verb's flags."])


def _print_version() -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"warploom {version('warploom')}")
    except PackageNotFoundError:
        print("warploom (not installed: running from source)")
    return 0
