"""Look inside: `inspect model` shows what a model is made of, without making it; `inspect tokens` how a text splits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..config import PRESETS, ModelConfig


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="warploom inspect", description=__doc__)
    topics = parser.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    for name, (show, describe) in TOPICS.items():
        topic = topics.add_parser(name, help=show.__doc__, description=show.__doc__)
        describe(topic)
    options = parser.parse_args(argv)
    TOPICS[options.topic][0](options)
    return 0


def show_model(options: argparse.Namespace) -> None:
    """Parameters, FLOPs and memory of a model directory or a preset."""
    config = _config_of(options.model)
    length = options.sequence or config.max_seq_len
    total, active = config.parameter_count(), config.parameter_count(active=True)
    print(options.model)
    for field, value in config.to_dict().items():
        if value not in (None, False) and value != 0:
            _row(field, value)
    print()
    _row("parameters", f"{total:,}")
    if active != total:
        _row("  active per token", f"{active:,}")
    _row("  lookup tables", f"{total - config.parameter_count(embeddings=False):,}")
    _row("training FLOPs/token", f"{config.flops_per_token(length):.3g} at {length} tokens")
    _row("forward FLOPs/token", f"{config.flops_per_token(length, training=False):.3g}")
    for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        _row(f"weights in {name}", _gib(total * size))
    _row("training state", f"{_gib(total * 16)} (float32 weights, gradients and two moments)")
    _row("cache per token", f"{config.kv_bytes_per_token() / 1024:.1f} KiB in bfloat16")
    _row("cache, full context", _gib(config.kv_bytes_per_token() * config.max_seq_len))


def show_tokens(options: argparse.Namespace) -> None:
    """How a text splits into tokens: their ids, and the characters each covers."""
    from ...tokenizer import load_tokenizer
    from . import tokenizer

    tokenizer.show_tokens(load_tokenizer(options.tokenizer), options.text)


def _tokens_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help="what to split")
    parser.add_argument("--tokenizer", required=True, help="a model directory, or a tokenizer.json")


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"a model directory, or a preset: {', '.join(PRESETS)}")
    parser.add_argument("--sequence", type=int, help="length at which attention is counted (default: max_seq_len)")


def _config_of(name: str) -> ModelConfig:
    if name in PRESETS:
        return ModelConfig.preset(name)
    if not Path(name).exists():
        raise ValueError(f"{name!r} is neither a model directory nor a preset ({', '.join(PRESETS)})")
    from ..hub import load_config

    return load_config(name)


TOPICS: dict[str, tuple[Callable, Callable]] = {
    "model": (show_model, _model_flags),
    "tokens": (show_tokens, _tokens_flags),
}


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _row(name: str, value: object) -> None:
    print(f"  {name:22} {value}")
