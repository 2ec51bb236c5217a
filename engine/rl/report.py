"""Reports of an RL run: step metrics, run card, reward and length curves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...tokenizer.sources import atomic_writer, write_text
from ..training.callbacks import duration, memory_in_use
from ..training.report import directory_title
from ..training.run_state import TrainResult


@dataclass(frozen=True, slots=True)
class RLProgress:
    """Metrics of an RL step."""

    step: int
    steps: int
    """Steps in all (an estimate, where the budget is time)."""
    reward: float
    reward_std: float
    """Standard deviation over the samples of the step."""
    mixed: float
    """Share of groups whose samples got different rewards: the others teach nothing."""
    length: float
    """Mean tokens of a sample."""
    ended: float
    """Share of samples that ended by themselves."""
    entropy: float
    """Mean −log p of the sampled tokens, in nats: an estimate of the policy's entropy."""
    mismatch: float
    """Largest difference between a token's log-probability in the server and in the trainer."""
    mismatch_k3: float
    """The same as an estimate of the KL divergence."""
    lr: float
    grad_norm: float
    samples: int
    """Samples of the step."""
    tokens: int
    """Tokens sampled so far."""
    sampled_per_second: float
    trained_per_second: float
    seconds: float
    """Time of this run, evaluation and saving included."""
    seconds_left: float
    bad_steps: int = 0

    @property
    def curve(self) -> float:
        """The metric to plot over the steps."""
        return self.reward

    def line(self) -> str:
        """The metrics as a line of a log."""
        return (
            f"step {self.step}/{self.steps}  reward {self.reward:.3f} ± {self.reward_std:.3f}  "
            f"length {self.length:.1f}  ended {self.ended:.0%}  entropy {self.entropy:.3f}  "
            f"mismatch {_small(self.mismatch)}  norm {self.grad_norm:.2f}  "
            f"{self.sampled_per_second:,.0f} + {self.trained_per_second:,.0f} tok/s  {duration(self.seconds_left)} left"
        )

    def rows(self, curve: str, evaluation: Any) -> Iterator[tuple[str, str, str]]:
        """The metrics as rows of the live panel: (name, value, remark)."""
        yield "reward", f"[bold]{self.reward:.3f}[/] ± {self.reward_std:.3f}", curve
        if evaluation is not None:
            yield "fresh problems", f"{evaluation.accuracy:.3f}", str(evaluation).split(", ", 1)[-1]
        yield "length", f"{self.length:.1f} tokens", f"{self.ended:.0%} of samples ended, {self.mixed:.0%} groups mixed"
        yield "entropy", f"{self.entropy:.3f}", f"gradient norm {self.grad_norm:.2f}, rate {self.lr:.2e}"
        yield "mismatch", _small(self.mismatch), f"KL (k3) {_small(self.mismatch_k3)}"
        speeds = f"{self.sampled_per_second:,.0f} sampled", f"{self.trained_per_second:,.0f} trained tokens a second"
        yield "speed", *speeds
        yield "memory", memory_in_use(), f"{self.tokens:,} tokens sampled"


def _small(value: float) -> str:
    return "0.0" if value == 0 else f"{value:.1e}"


def write_rl_card(directory: Path, run: dict[str, Any], result: TrainResult, samples: list[dict[str, Any]]) -> None:
    """`run.json`, `RUN.md` and `curves.png` of a run."""
    steps = [line for line in result.history if "reward" in line]
    found = [line for line in result.history if "accuracy" in line]
    outcome = {"steps": result.steps, "tokens": result.tokens, "seconds": result.seconds}
    outcome |= {"stopped_by": result.stopped_by, "evaluations": found, "mismatch": max_of(steps, "mismatch")}
    run = {**run, "result": outcome, "samples": samples}
    write_text(directory / "run.json", json.dumps(run, indent=1, default=str) + "\n")
    write_text(directory / "RUN.md", _markdown(run, steps, found))
    draw_curves(result.history, directory / "curves.png")


def max_of(lines: list[dict[str, Any]], name: str) -> float | None:
    return max((line[name] for line in lines), default=None)


def _markdown(run: dict[str, Any], steps: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    config, result, model = run["config"], run["result"], run["model"]
    fifth = max(1, len(steps) // 5)
    ends = steps[:fifth], steps[-fifth:]

    def moved(name: str, form: str) -> str:
        means = (sum(line[name] for line in part) / len(part) for part in ends)
        return " → ".join(form.format(mean) for mean in means) if steps else "not measured"

    accuracy = " → ".join(f"{line['accuracy']:.3f} (step {line['step']})" for line in (found[:1] + found[1:][-1:]))
    recipe = ("group", "batch_size", "max_tokens", "lr", "normalize", "kl", "updates")
    rows = [
        ("model", f"{run['parameters']:,} parameters, {model['n_layers']} layers, from {config['init_from']}"),
        ("prompts", f"{run['data']['source']}, reward {', '.join(config['reward']) or 'the task'}"),
        ("recipe", ", ".join(f"{name} {config[name]}" for name in recipe)),
        ("training", f"{result['steps']} steps, {result['tokens']:,} tokens sampled, {result['seconds']:.0f} s"),
        ("accuracy on fresh problems", accuracy or "not measured"),
        ("reward, first and last fifth", moved("reward", "{:.3f}")),
        ("length, first and last fifth", moved("length", "{:.1f}")),
        ("largest mismatch", "not measured" if result["mismatch"] is None else _small(result["mismatch"])),
        ("hardware", f"{run['hardware']['device']}, {run['hardware']['threads']} threads, {run['dtype']}"),
        ("code", f"{run['commit'] or 'unknown commit'}, torch {run['hardware']['torch']}, seed {config['seed']}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    shown = "\n".join(
        f"Step {each['step']}:\n\n```text\n{each['prompt']}{each['text']}\n```\n" for each in run["samples"][-6:]
    )
    title = directory_title(config["out"])
    return f"# {title}\n\n| | |\n|---|---|\n{table}\n\n![reward and length](curves.png)\n\n{shown}"


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Reward, accuracy on fresh problems, and length over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    right = left.twinx()
    steps = [line for line in history if "reward" in line]
    found = [line for line in history if "accuracy" in line]
    numbers = [line["step"] for line in steps]
    left.plot(numbers, [line["reward"] for line in steps], color="#08519c", label="reward")
    if found:
        accuracy = [line["accuracy"] for line in found]
        left.plot([line["step"] for line in found], accuracy, "o", color="#08519c", label="accuracy on fresh problems")
    right.plot(numbers, [line["length"] for line in steps], color="#e6550d", linewidth=1, label="length")
    left.set(xlabel="step", ylabel="reward")
    right.set(ylabel="tokens a sample")
    left.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with atomic_writer(path) as file:
        figure.savefig(file, dpi=120, format="png")
