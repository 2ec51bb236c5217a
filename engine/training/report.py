"""Run report: configuration and results as `RUN.md`, `run.json` and `loss.png`."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ...tokenizer.sources import atomic_writer, write_text
from ..device import device_name
from .config import TrainConfig
from .run_state import RunState, TrainResult


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe the machine and library versions of a run."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


@functools.cache
def commit() -> str | None:
    """Git commit of this code, if it runs from a repository."""
    try:
        here = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def describe(run: RunState) -> dict[str, Any]:
    """Description of a run for `run.json`."""
    meta = run.inputs.data.meta
    return {
        "config": run.config.to_dict(),
        "model": run.inputs.model.to_dict(),
        "parameters": run.shards.parameters,
        "trained_parameters": run.trained_parameters,
        "dtype": str(run.dtype).removeprefix("torch."),
        "processes": run.mesh.axes,
        "steps": run.steps,
        "micro_batches": run.grad_accum_steps,
        "data": {
            "source": meta.source,
            "train_tokens": len(run.train_split),
            "train_sha256": run.train_split.sha256,
            "tokenizer_sha256": meta.tokenizer_sha256,
        },
        "hardware": hardware(run.device),
        "commit": commit(),
    }


def write_card(
    directory: Path, run: dict[str, Any], result: TrainResult, utilization: float, samples: list[dict[str, Any]]
) -> None:
    """Write `run.json`, `RUN.md` and `loss.png`."""
    bits = result.evaluation.bits_per_byte if result.evaluation else None
    outcome = {
        "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds, "val_loss": result.val_loss,
        "bits_per_byte": bits, "stopped_by": result.stopped_by, "tokens_per_second": result.tokens_per_second,
        "utilization": utilization,
    }  # fmt: skip
    run = {**run, "result": outcome, "samples": samples}
    write_text(directory / "run.json", json.dumps(run, indent=1, default=str) + "\n")
    write_text(directory / "RUN.md", _markdown(run))
    draw_losses(result.history, directory / "loss.png")


def _markdown(run: dict[str, Any]) -> str:
    result, model, config = run["result"], run["model"], run["config"]
    bits = result.get("bits_per_byte")
    rows = [
        ("model", f"{run['parameters']:,} parameters, {model['n_layers']} layers, width {model['d_model']}"),
        ("trained", f"{run['trained_parameters']:,} parameters"),
        (
            "data",
            f"{run['data']['source']}: {run['data']['train_tokens']:,} tokens, {run['data']['train_sha256'][:16]}…",
        ),
        ("recipe", _recipe(config)),
        ("training", f"{result['steps']} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, {result['utilization']:.0%} of the measured matmul"),
        ("validation loss", f"{result['val_loss']:.4f}" if result["val_loss"] is not None else "not measured"),
        ("bits per byte", f"{bits:.4f}" if bits is not None else "not measured"),
        ("hardware", f"{run['hardware']['device']}, {run['hardware']['threads']} threads, {run['dtype']}"),
        ("code", f"{run['commit'] or 'unknown commit'}, torch {run['hardware']['torch']}, seed {config['seed']}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    samples = "\n".join(
        f"Step {sample['step']}:\n\n```text\n{sample['prompt']}{sample['text']}\n```\n"
        for sample in run["samples"][-3:]
    )
    return f"# {directory_title(config['out'])}\n\n| | |\n|---|---|\n{table}\n\n![loss](loss.png)\n\n{samples}"


def _recipe(config: dict[str, Any]) -> str:
    """One line of settings: those that always matter, and those that differ from their defaults."""
    always = ("optimizer", "lr", "schedule", "batch_size", "order")
    default = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    aside = {"data", "out", "model", "seed", "resume", "overwrite", *always}
    changed = [name for name, value in config.items() if name not in aside and value != default[name]]
    return ", ".join(f"{name} {config[name]}" for name in (*always, *changed))


def directory_title(path: str) -> str:
    return Path(path).name or "run"


def draw_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(line["step"], line["loss"]) for line in history if "loss" in line]
    val = [(line["step"], line["val_loss"]) for line in history if "loss" not in line and "val_loss" in line]
    if train:
        axes.plot(*zip(*train), color="#9ecae1", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val), color="#08519c", marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend(frameon=False)
    with atomic_writer(path) as file:
        figure.savefig(file, dpi=120, format="png")
