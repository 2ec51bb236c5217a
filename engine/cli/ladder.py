"""`warploom ladder`: ablation from a bare MLP to a mixture of experts, each rung on the same data and budget.

Each rung is the one below with a single idea more, and all have about the same number of parameters a token uses. So
the differences between neighbors are what the ideas are worth, at this size, on this text, for one seed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..config import ModelConfig
from ..errors import InputError
from .flags import parse

if TYPE_CHECKING:
    from ..training.config import TrainConfig


@dataclass(frozen=True)
class Rung:
    """One rung: name, change to the configuration below, and the idea."""

    name: str
    lesson: str
    changes: dict[str, Any]


RUNGS = (
    Rung("mlp", "a token sees only itself: what follows what", dict(
        norm="none", position="none", ffn="relu", sliding_window=1, n_heads=1, tie_embeddings=True)),
    Rung("attention", "it gathers from all tokens before it", dict(sliding_window=None)),
    Rung("heads", "several gatherings at once", dict(n_heads="heads")),
    Rung("positions", "it knows where they stand (sinusoids)", dict(position="sinusoidal")),
    Rung("layernorm", "every block reads numbers of unit scale", dict(norm="layernorm", bias=True)),
    Rung("gpt2", "learned positions, a smooth GELU", dict(position="learned", ffn="gelu")),
    Rung("rmsnorm", "no mean, no biases: less to compute", dict(norm="rmsnorm", bias=False)),
    Rung("rope", "positions turn queries and keys: distance counts", dict(position="rope")),
    Rung("swiglu", "one half of the feed-forward gates the other", dict(ffn="swiglu")),
    Rung("llama", "query heads share keys and values (GQA)", dict(n_kv_heads="kv_heads")),
    Rung("qk-norm", "queries and keys of unit scale (Qwen3)", dict(qk_norm=True)),
    Rung("moe", "many small experts, two a token (Mixtral)", dict(n_experts=8, d_ff="expert")),
)  # fmt: skip


@dataclass(frozen=True)
class Flags:
    """Train each rung from a bare MLP to a MoE Llama on the same data and budget, and see what each idea is worth."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "stdlib"
    """A dataset directory (`warploom data`), a text file, a folder or glob of text files, or 'stdlib'."""
    out: str = "runs/ladder"
    """Directory of the table, the curves and each rung's model. Rungs that are there already are not trained again."""
    tokenizer: str = "bpe"
    """For raw text: bpe, char or word, or a directory with a tokenizer.json."""
    vocab_size: int = 1024
    """Tokens of a tokenizer trained here."""
    rungs: tuple[str, ...] = field(default_factory=lambda: tuple(rung.name for rung in RUNGS))
    """Which rungs to train."""
    steps: int = 400
    """Optimizer steps of each rung."""
    batch_size: int = 16
    """Rows of a step."""
    context: int = 128
    """Tokens of a row."""
    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Blocks."""
    n_heads: int = 4
    """Query heads, from the rung that has several; half as many key and value heads on the last rungs."""
    lr: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights and data order."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def run(argv: list[str]) -> int:
    flags = parse(Flags, argv, "ladder")
    known = {rung.name for rung in RUNGS}
    if unknown := [name for name in flags.rungs if name not in known]:
        raise InputError(f"rungs: {unknown[0]!r} is none of {', '.join(rung.name for rung in RUNGS)}")
    from ...tokenizer.sources import write_text
    from ..training.trainer import train
    from .train import callback

    models, results = architectures(flags), []  # before the data: a shape that cannot be is said at once
    for config, rung in plan(flags, models, share_data(flags)):
        print(f"\n── {rung.name}: {rung.lesson}", file=sys.stderr)
        if not finished(config):
            result = train(config, [callback()])
            if result.stopped_by:
                print(f"stopped at {rung.name}: the same command goes on from here", file=sys.stderr)
                return 130
        results.append(read(rung, Path(config.out)))
    out = Path(flags.out)
    table = "\n".join(markdown(results))
    title = f"{flags.steps} steps of {flags.batch_size} × {flags.context} tokens each, seed {flags.seed}"
    write_text(out / "LADDER.md", f"# Ladder\n\n{title}\n\n{table}\n\n![validation loss](ladder.png)\n")
    write_text(out / "ladder.json", json.dumps(results, indent=1) + "\n")
    draw(results, out / "ladder.png")
    print(f"\n{title}\n\n{table}\n\ncurves: {out / 'ladder.png'}; a model for each rung in {out}")
    return 0


def share_data(flags: Flags) -> str:
    """Token files that all rungs share; raw text is tokenized once, to OUT/data."""
    from ..training.config import TrainConfig
    from ..training.inputs import open_data

    first = TrainConfig(
        data=flags.data, out=flags.out, tokenizer=flags.tokenizer, model=dict(vocab_size=flags.vocab_size)
    )
    return str(open_data(first, lambda text: print(text, file=sys.stderr), reuse=True).directory)


def architectures(flags: Flags) -> dict[str, dict[str, Any]]:
    """Configuration of each rung: its change on top of all below."""
    width = ModelConfig(vocab_size=1, d_model=flags.d_model, n_heads=flags.n_heads).ff_size
    named = {"heads": flags.n_heads, "kv_heads": max(1, flags.n_heads // 2), "expert": max(8, width // 2)}
    model = dict(d_model=flags.d_model, n_layers=flags.n_layers, max_seq_len=flags.context)
    found = {}
    for rung in RUNGS:
        model |= {name: named.get(value, value) if isinstance(value, str) else value
                  for name, value in rung.changes.items()}  # fmt: skip
        found[rung.name] = dict(model)
    return found


def plan(flags: Flags, models: dict[str, dict[str, Any]], data: str) -> list[tuple[TrainConfig, Rung]]:
    """Training configurations of all rungs, bottom first."""
    from ..training.config import TrainConfig

    runs = []
    for number, rung in enumerate(RUNGS, 1):
        if rung.name in flags.rungs:
            model = dataclasses.asdict(ModelConfig(**{"vocab_size": 1, **models[rung.name]})) | {"vocab_size": 0}
            config = TrainConfig(
                data=data, out=str(Path(flags.out) / f"{number:02}-{rung.name}"), model=model, steps=flags.steps,
                batch_size=flags.batch_size, context=flags.context, lr=flags.lr, seed=flags.seed,
                device=flags.device, eval_every=max(1, flags.steps // 8), save_every=0, sample_tokens=0, overwrite=True,
            )  # fmt: skip
            runs.append((config, rung))
    return runs


def finished(config: TrainConfig) -> bool:
    """Return whether exactly this run was completed before."""
    path = Path(config.out) / "run.json"
    if not path.is_file():
        return False
    card = json.loads(path.read_text("utf-8"))
    asked = json.loads(json.dumps(config.to_dict(), default=str))
    return card["config"] == asked and card["result"]["stopped_by"] is None


def read(rung: Rung, directory: Path) -> dict[str, Any]:
    """Result of a rung, from its run card and log."""
    from ..training.callbacks import JsonLog

    card = json.loads((directory / "run.json").read_text("utf-8"))
    lines = JsonLog.read(directory / "log.jsonl")
    curve = [(line["step"], line["val_loss"]) for line in lines if "loss" not in line and "val_loss" in line]
    result = {name: card["result"][name] for name in ("val_loss", "bits_per_byte", "tokens_per_second")}
    return {"name": rung.name, "lesson": rung.lesson, "parameters": card["parameters"], **result, "curve": curve}


def markdown(results: list[dict[str, Any]]) -> list[str]:
    """Markdown table: what each rung changed, and what it gained."""
    lines = [
        "| rung | what it adds | parameters | validation loss | against the rung below | bits per byte | tokens/s |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for below, r in zip([None, *results], results):
        gain = f"{r['val_loss'] - below['val_loss']:+.3f}" if below else ""
        lines.append(
            f"| {r['name']} | {r['lesson']} | {r['parameters']:,} | {r['val_loss']:.3f} | {gain} | "
            f"{r['bits_per_byte']:.3f} | {r['tokens_per_second']:,.0f} |"
        )
    return lines


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the validation loss of all rungs."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, r in enumerate(results):
        color = colormaps["viridis"](place / max(1, len(results) - 1) * 0.9)
        axes.plot(*zip(*r["curve"]), color=color, marker="o", markersize=3, label=f"{r['name']}  {r['val_loss']:.3f}")
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=120)
