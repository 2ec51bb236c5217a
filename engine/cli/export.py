"""Export a model for other tools: `--to hf` (config.json + safetensors), `bin` (pytorch_model.bin), `gguf` (a file for
llama.cpp) or `tiktoken` (the tokenizer's rank file). A LoRA adapter is exported as an adapter, or with `--merge` merged
into its base."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from .flag_errors import Parser
from .model_argument import model_first

DTYPES = ("float32", "bfloat16", "float16", "q8_0")  # the last is --quantize q8_0, as it was once asked for
QUANTIZED = ("q8_0", "q4_0", "q4_k_m")


def run(argv: list[str]) -> int:
    parser = Parser(prog="warploom export", description=__doc__)
    parser.add_argument("model", type=Path, help="the model directory to read")
    parser.add_argument("out", type=Path, help="the directory to write (hf, bin) or the file (gguf, tiktoken)")
    parser.add_argument("--to", choices=FORMATS, default="hf", help="what to write (default: hf)")
    parser.add_argument("--dtype", choices=DTYPES, help="number format (default: as stored)")
    parser.add_argument("--quantize", choices=QUANTIZED, help="gguf only: 8 bits, 4 bits, or llama.cpp's Q4_K_M")
    parser.add_argument("--merge", action="store_true", help="of an adapter: write its base with the adapter merged")
    options = parser.parse_args(model_first(argv))
    if options.dtype == "q8_0":
        options.dtype, options.quantize = None, "q8_0"
    if options.quantize and options.to != "gguf":
        raise InputError(f"{options.quantize} is a format of gguf, not of {options.to}")
    if options.quantize and options.dtype:
        raise InputError(f"dtype {options.dtype} and quantize {options.quantize} are two number formats: give one")
    FORMATS[options.to](options)
    return 0


def _write_directory(options: argparse.Namespace) -> None:
    from ..formats.adapters import is_adapter
    from ..formats.families import architecture_of
    from ..formats.model_directory import load_model
    from ..formats.model_writer import copy_adapter, save_model

    if options.merge and not is_adapter(options.model):
        raise InputError(f"{options.model} is no adapter: there is nothing to merge")
    if is_adapter(options.model) and not options.merge and options.to == "hf":
        adapter = copy_adapter(options.model, options.out)
        print(f"wrote {options.out}: an adapter of rank {adapter.config.rank} of {adapter.config.base}")
        return
    model, tokenizer = load_model(options.model, device="cpu", dtype=options.dtype)
    save_model(model, options.out, tokenizer, weights="bin" if options.to == "bin" else "safetensors")
    kind = architecture_of(model.config)
    print(f"wrote {options.out}: {model.config.parameter_count():,} parameters as {kind}")
    if kind == "warploom":
        print("note: no published architecture matches this configuration, so only warploom opens it")


def _write_gguf(options: argparse.Namespace) -> None:
    from ..formats.gguf import save_gguf
    from ..formats.model_directory import load_model

    out = _file(options.out, "model.gguf")
    dtype = "float32" if options.quantize else options.dtype
    model, tokenizer = load_model(options.model, device="cpu", dtype=dtype)
    kind = save_gguf(model, out, tokenizer, options.quantize or options.dtype)
    print(f"wrote {out}: {model.config.parameter_count():,} parameters as {kind}, {out.stat().st_size / 1e6:,.1f} MB")


def _write_tiktoken(options: argparse.Namespace) -> None:
    from ...tokenizer import BPETokenizer
    from ..formats.model_info import open_tokenizer

    tokenizer = open_tokenizer(options.model)
    if not isinstance(tokenizer, BPETokenizer):
        raise InputError(f"a {type(tokenizer).__name__} has no rank file: tiktoken is byte-level BPE")
    out = _file(options.out, "tokenizer.tiktoken")
    tokenizer.to_tiktoken(out)
    print(f"wrote {out}: {len(tokenizer.vocab):,} tokens. Not part of the format, so tell tiktoken yourself:")
    print(f"  pattern {tokenizer.pattern}, special tokens {tokenizer.special_tokens}")


def _file(out: Path, name: str) -> Path:
    """Output file: `out` itself, or a file inside it if it is a directory."""
    return out / name if out.is_dir() else out


FORMATS = {"hf": _write_directory, "bin": _write_directory, "gguf": _write_gguf, "tiktoken": _write_tiktoken}
