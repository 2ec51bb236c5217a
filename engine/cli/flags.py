"""Command-line flags from dataclasses (tyro), with one-line errors."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any, TypeVar

import tyro

from ..errors import InputError
from .flag_errors import sentence_of
from .help_text import Help, unwrap_docstrings

T = TypeVar("T")

RENAMED = {
    "step_tokens": "max_batch_tokens",
    "max_context": "max_seq_len",
    "speculate": "ngram_draft_tokens",
    "draft": "draft_model",
    "recompute": "activation_checkpointing",
    "clip": "max_grad_norm",
    "max_bad_steps": "max_nonfinite_steps",
    "max_body": "max_body_bytes",
}
"""Names of settings before version 0.2 and their names today: old flags, TOML files and runs are still read."""

ELSEWHERE = {
    "max_model_len": "max_seq_len",
    "ctx_size": "max_seq_len",
    "max_num_seqs": "max_batch",
    "parallel": "max_batch",
    "max_num_batched_tokens": "max_batch_tokens",
    "block_size": "page_size",
    "gpu_memory_utilization": "kv_memory",
    "quantization": "quantize",
    "kv_cache_dtype": "kv_dtype",
    "tensor_parallel_size": "tensor_parallel",
    "data_parallel_size": "replicas",
    "enable_prefix_caching": "prefix_cache",
    "model_draft": "draft_model",
    "lora_modules": "adapter",
    "lora": "adapter",
    "alias": "served_model_name",
    "chat_template_file": "chat_template",
    "ssl_cert_file": "ssl_certfile",
    "ssl_key_file": "ssl_keyfile",
}
"""Names of settings in vLLM and llama.cpp's server, and their names here: told to whoever uses one."""


def renamed(argv: list[str]) -> list[str]:
    """Replace old names of flags by current ones, with a warning for each."""
    return [_renamed(word) for word in argv]


def _renamed(word: str) -> str:
    flag, equals, value = word.partition("=")
    no = "--no-" if flag.startswith("--no-") else "--"
    name = flag.removeprefix(no).replace("-", "_")
    if not flag.startswith("--") or name not in RENAMED:
        return word
    new = no + RENAMED[name].replace("_", "-")
    print(f"warploom: {flag} is now {new}; the old name will go in the next release", file=sys.stderr)
    return new + equals + value


def renamed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Saved settings under current names."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def parse(kind: type[T], argv: list[str], verb: str, default: Any = tyro.MISSING_NONPROP) -> T:
    """Parse a command line into the dataclass `kind`, with flat kebab-case flags; mistakes raise one InputError."""
    argv, errors, explained = renamed(argv), io.StringIO(), Help()
    if "-h" in argv or "--help" in argv:
        unwrap_docstrings(kind)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(explained):
            return tyro.cli(
                kind,
                prog=f"warploom {verb}",
                args=argv,
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            print(explained.shown())
            raise
        told = sentence_of(errors.getvalue()) + (_hint(argv) if verb == "serve" else "")
        raise InputError(f"{told} (warploom {verb} --help lists the flags)") from None


def _hint(argv: list[str]) -> str:
    """Our names for flags of vLLM and llama.cpp's server."""
    flags = (word.partition("=")[0] for word in argv if word.startswith("--"))
    known = {flag: ELSEWHERE.get(flag[2:].replace("-", "_")) for flag in flags}
    return "".join(f"; {flag} is --{name.replace('_', '-')} here" for flag, name in known.items() if name)
