"""`warploom inspect`: `model` shows parameters, FLOPs and memory without loading weights; `tokens` how a text is split;
`attention` attention maps; `data` the loss mask of training data; `families` the supported architectures."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import PRESETS, ModelConfig
from ..errors import InputError
from .flag_errors import Parser
from .model_argument import model_first

MAP_TOKENS = 96  # more could not be read on one picture
FONTS = ("DejaVu Sans Mono", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei", "Noto Sans")


def run(argv: list[str]) -> int:
    parser = Parser(prog="warploom inspect", description=__doc__)
    topics = parser.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    for name, (show, describe) in TOPICS.items():
        topic = topics.add_parser(name, help=show.__doc__, description=show.__doc__)
        describe(topic)
    names_one = argv[:1] in (["model"], ["attention"])
    options = parser.parse_args(model_first(argv, 1) if names_one else argv)
    TOPICS[options.topic][0](options)
    return 0


def show_model(options: argparse.Namespace) -> None:
    """Show parameters, FLOPs and memory of a model directory or preset."""
    config = _config_of(options.model)
    length = options.sequence or config.max_seq_len
    total, active = config.parameter_count(), config.parameter_count(active=True)
    print(options.model)
    for field, value in config.to_dict().items():
        if value not in (None, False, 0, ""):
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
    print()
    from ..formats.families import architecture_of
    from ..formats.model_info import stored_as

    _row("family", architecture_of(config))
    if options.model not in PRESETS:
        _row("weights as stored", stored_as(options.model))
    for executor, refused in _executors(config):
        _row(executor, "layer by layer: " + refused if refused else "yes")


def _executors(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Executors that do not support a configuration, each with the fields it lacks."""
    from ..serving.execution.gpu_model import PagedAttention, PagedLatentAttention
    from ..serving.execution.serving_model import NativeTransformer
    from ..training.fused_block import is_supported as is_fused

    paged = PagedLatentAttention if config.kv_rank else PagedAttention
    predicates = {"serve in one C++ call": NativeTransformer.is_supported, "serve on a GPU, fused":
                  paged.is_supported, "train in fused blocks": is_fused}  # fmt: skip
    for executor, is_supported in predicates.items():
        refused = ", ".join(f"{field}={value!r}" for field, value in is_supported.refused(config).items())
        yield executor, "" if is_supported(config) else refused or "widths are not whole vectors"


def show_families(options: argparse.Namespace) -> None:
    """Print the table of supported families (docs/models.md)."""
    from ..formats.families import family_table

    print(*family_table(), sep="\n")


def show_tokens(options: argparse.Namespace) -> None:
    """Show the tokens of a text: ids and the characters each covers."""
    from ..formats.model_info import open_tokenizer
    from . import tokenizer

    tokenizer.show_tokens(open_tokenizer(options.tokenizer), options.text)


def show_attention(options: argparse.Namespace) -> None:
    """Draw the attention maps of a prompt: a PNG a layer, a panel a head."""
    from ..attention_maps import attention_maps
    from ..formats.model_directory import load_model

    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    if tokenizer is None:
        raise InputError(f"{options.model} has no tokenizer.json, so there is no prompt it could read")
    tokens = tokenizer.encode(options.prompt)
    limit = min(model.config.max_seq_len, MAP_TOKENS)
    if not 0 < len(tokens) <= limit:
        raise InputError(f"prompt has {len(tokens)} tokens; a map shows between 1 and {limit}")
    if not 0 <= options.layer <= model.config.n_layers:
        raise InputError(f"layer={options.layer} is not between 1 and {model.config.n_layers} (0 = all)")
    names = [_visible(tokenizer.decode([token])) for token in tokens]
    options.out.mkdir(parents=True, exist_ok=True)
    for layer, weights_HTS in enumerate(attention_maps(model, tokens), 1):
        if options.layer in (0, layer):
            path = options.out / f"layer-{layer:02}.png"
            _draw_heads(weights_HTS.numpy(), names, f"layer {layer}", path)
            looks = ", ".join(f"{head} {_habit(weights_TS)}" for head, weights_TS in enumerate(weights_HTS, 1))
            print(f"{path}: head {looks}")


def show_data(options: argparse.Namespace) -> None:
    """Show the first training documents, with the tokens in the loss in green (⟦ ⟧ without color)."""
    from ..data import TokenData

    made = options.run / "data"
    data = TokenData(made if (made / "meta.json").is_file() else options.run)
    split, tokenizer = data.split(options.split), data.tokenizer()
    ends = [*split.starts[1:], len(split)]
    for number, (start, end) in enumerate(list(zip(split.starts, ends))[: options.rows], 1):
        ids = split.tokens[start:end].tolist()
        learn = [True] * len(ids) if split.learn is None else (split.learn[start:end] > 0).tolist()
        print(f"{_styled(f'document {number}', '1')}: {len(ids)} tokens, {sum(learn)} learned")
        for learned, group in itertools.groupby(zip(ids, learn), key=lambda pair: pair[1]):
            text = tokenizer.decode([token for token, _ in group])
            print(_styled(text, "32", "⟦⟧") if learned else _styled(text, "2"), end="")
        print("\n")


def _styled(text: str, style: str, without: str = "") -> str:
    """Text in an ANSI style, or between the two characters of `without` where color is off."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else line for line in text.split("\n"))
    return f"{without[:1]}{text}{without[1:]}"


def _habit(weights_TS) -> str:
    """Name a head's main attention pattern: to itself, to the previous token, or to the first (sink)."""
    later_TS = weights_TS[1:]  # the first token has no choice
    if not len(later_TS):
        return "has one token to look at"
    shares = {
        "itself": later_TS.diagonal(1).mean(), "the token before": later_TS.diagonal(0).mean(),
        "the first token": later_TS[:, 0].mean(),
    }  # fmt: skip
    place = max(shares, key=shares.__getitem__)
    return f"→ {place} ({shares[place]:.0%})" if shares[place] > 0.3 else "→ spread out"


def _draw_heads(weights_HTS, names: list[str], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    small = dict(fontsize=6, family=[name for name in FONTS if name in installed], parse_math=False)
    heads, across = len(weights_HTS), min(4, len(weights_HTS))
    down, side = -(-heads // across), 1.2 + 0.17 * len(names)
    figure = Figure(figsize=(side * across, side * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: rows ask, columns answer")
    for head, panel in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if head >= heads:
            panel.set_visible(False)
            continue
        image = panel.imshow(weights_HTS[head], cmap="magma", vmin=0, vmax=1)
        panel.set_title(f"head {head + 1}", fontsize=9)
        panel.set_xticks(range(len(names)), names, rotation=90, **small)
        panel.set_yticks(range(len(names)), names, **small)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="share of attention")
    with warnings.catch_warnings():  # a character no installed font has is drawn as a box
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=130)


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run that made its tokens itself, or a directory of token files")
    parser.add_argument("--rows", type=int, default=3, help="documents to show (default: 3)")
    parser.add_argument("--split", default="train", help="train, val or test (default: train)")


def _attention_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--prompt", required=True, help=f"what it reads, at most {MAP_TOKENS} tokens")
    parser.add_argument("--layer", type=int, default=0, help="one layer, counted from 1 (default: 0, all of them)")
    parser.add_argument("--out", type=Path, default=Path("attention"), help="folder of the PNGs (default: attention)")


def _tokens_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help="what to split")
    parser.add_argument("--tokenizer", required=True, help="a model directory, or a tokenizer.json")


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"a model directory, or a preset: {', '.join(PRESETS)}")
    parser.add_argument("--sequence", type=int, help="length at which attention is counted (default: max_seq_len)")


def _config_of(name: str) -> ModelConfig:
    if name in PRESETS:
        return ModelConfig.preset(name)
    from ..formats.model_info import load_config

    if not Path(name).exists() and "/" not in name:
        raise InputError(f"{name!r} is neither a model directory, a Hub id nor a preset ({', '.join(PRESETS)})")
    return load_config(name)


TOPICS: dict[str, tuple[Callable, Callable]] = {
    "model": (show_model, _model_flags),
    "tokens": (show_tokens, _tokens_flags),
    "attention": (show_attention, _attention_flags),
    "data": (show_data, _data_flags),
    "families": (show_families, lambda parser: None),
}


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _row(name: str, value: object) -> None:
    print(f"  {name:22} {value}")
