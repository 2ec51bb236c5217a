"""Write a model directory for other tools: `--to hf` (config.json + safetensors), `--to bin` (pytorch_model.bin)."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = {"hf": "safetensors", "bin": "bin"}


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="warploom export", description=__doc__)
    parser.add_argument("model", type=Path, help="the model directory to read")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--to", choices=FORMATS, default="hf", help="hf: model.safetensors; bin: pytorch_model.bin")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="number format (default: as stored)"
    )
    options = parser.parse_args(argv)

    from ..architectures import architecture_of
    from ..hub import load_model, save_model

    model, tokenizer = load_model(options.model, device="cpu", dtype=options.dtype)
    save_model(model, options.out, tokenizer, weights=FORMATS[options.to])
    kind = architecture_of(model.config)
    print(f"wrote {options.out}: {model.config.parameter_count():,} parameters as {kind}")
    if kind == "warploom":
        print("note: no published architecture matches this configuration, so only warploom opens it")
    return 0
