"""Callbacks: the trainer reports events; each callback prints, logs or forwards them.

A `Callback` has one method a kind of event, all empty: override the ones you need and pass it to `train(config,
callbacks=[…])`. Those here write a line now and then, draw the live panel, keep `log.jsonl`, and forward to TensorBoard
or Weights & Biases.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ...tokenizer.sources import write_text
from ..errors import InputError

if TYPE_CHECKING:
    from .evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class Progress:
    """Metrics of a training step."""

    step: int
    steps: int
    """Steps in all (an estimate, where the budget is time)."""
    loss: float
    """Cross-entropy of this step's tokens."""
    lr: float
    grad_norm: float
    tokens: int
    """Tokens trained on so far."""
    tokens_per_second: float
    seconds: float
    """Time of this run, evaluation and saving included."""
    seconds_left: float
    utilization: float
    """Matrix FLOPs per second, as a share of a large matrix product measured on this machine."""
    val_loss: float | None = None
    bad_steps: int = 0
    expert_load: tuple[float, float] | None = None
    """Least and most loaded expert, as multiples of an equal share."""

    @property
    def curve(self) -> float:
        """The metric to plot over the steps."""
        return self.loss

    def line(self) -> str:
        """The metrics as a line of a log."""
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}  lr {self.lr:.2e}  norm {self.grad_norm:.2f}  "
            f"{self.tokens_per_second:,.0f} tok/s  {self.utilization:.0%} of peak  {duration(self.seconds_left)} left"
        )

    def rows(self, curve: str, evaluation: Any) -> Iterator[tuple[str, str, str]]:
        """The metrics as rows of the live panel: (name, value, remark)."""
        yield "loss", f"[bold]{self.loss:.4f}[/]", curve
        if evaluation is not None:
            yield "validation", f"{evaluation.loss:.4f}", str(evaluation).split(", ", 1)[1]
        yield "speed", f"{self.tokens_per_second:,.0f} tok/s", f"{self.utilization:.0%} of this machine's matmul"
        yield "rate", f"{self.lr:.2e}", f"gradient norm {self.grad_norm:.2f}"
        if self.expert_load:
            yield "experts", f"{self.expert_load[0]:.2f}–{self.expert_load[1]:.2f}", "× equal share of tokens"
        yield "memory", memory_in_use(), f"{self.tokens:,} tokens seen"


class Callback:
    """Interface of training callbacks. All methods are optional."""

    def on_start(self, run: dict[str, Any]) -> None:
        """The run starts; `run` is its description as `run.json` will hold it."""

    def on_step(self, progress: Progress) -> None:
        """A step has ended."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The validation split was evaluated."""

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """A sample was generated: `text` after `prompt`."""

    def on_message(self, text: str) -> None:
        """A message for people: a warning, a stop, a skipped step."""

    def on_end(self) -> None:
        """The run ends, also by an error."""


def duration(seconds: float) -> str:
    """125 → '2m05s'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


class ConsoleLogger(Callback):
    """Log lines on the console: the first steps, then one about every ten seconds."""

    def __init__(self, every_seconds: float = 10.0, stream: TextIO | None = None) -> None:
        self.every_seconds, self.stream = every_seconds, stream or sys.stderr
        self.next = 0.0

    def on_step(self, p: Progress) -> None:
        if p.seconds < self.next and p.step != p.steps:
            return
        self.next = p.seconds + self.every_seconds
        self.on_message(p.line())

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.on_message(f"step {step}: validation {evaluation}")

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        self.on_message(f"step {step}, sample: {prompt[-40:]!r} → {text!r}")

    def on_message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class LivePanel(Callback):
    """Live terminal panel: progress, loss curve, throughput, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.curve: list[float] = []
        self.last: Progress | None = None
        self.evaluation: Evaluation | None = None
        self.live = Live(console=self.console, get_renderable=self._draw, refresh_per_second=4)

    def on_step(self, progress: Progress) -> None:
        self.curve.append(progress.curve)
        self.last = progress
        if not self.live.is_started:
            self.live.start()

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.evaluation = evaluation

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        from rich.text import Text

        self.console.print(
            Text(f"step {step}: ", "dim") + Text(prompt[-60:], "dim") + Text(text, "green"), highlight=False
        )

    def on_message(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, highlight=False)

    def on_end(self) -> None:
        self.live.stop()

    def _draw(self):
        """Redraw, at most four times a second."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        p = self.last
        if p is None:
            return ""
        table = Table.grid(padding=(0, 2))
        for row in p.rows(sparkline(self.curve, 40), self.evaluation):
            table.add_row(*row)
        table.add_row("time", duration(p.seconds), f"{duration(p.seconds_left)} left")
        table.add_row("", "", ProgressBar(total=p.steps, completed=p.step, width=40))
        return Panel(table, title=f"step {p.step} of {p.steps}", width=88)


def sparkline(values: list[float], width: int) -> str:
    """Draw numbers as a row of bars, each the mean of a bucket."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low or 1))] for mean in means)


def memory_in_use() -> str:
    """Peak memory of the accelerator, or of this process."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


class JsonLog(Callback):
    """`log.jsonl`: one object a logged step or evaluation. A resumed run continues the file from its own step."""

    def __init__(self, path: Path, every: int, start: int) -> None:
        self.every = every
        self.lines: list[dict[str, Any]] = [line for line in self.read(path) if line["step"] <= start] if start else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))  # a kill here leaves the old one
        self.file = open(path, "a")  # noqa: SIM115

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The lines of a log; a last line that a crash cut short is dropped."""
        lines = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def on_step(self, progress: Progress) -> None:
        if progress.step % self.every == 0 or progress.step in (1, progress.steps):
            self._write({key: _short(value) for key, value in asdict(progress).items() if value is not None})

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._write({"step": step, **evaluation.figures()})

    def on_end(self) -> None:
        self.file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def _short(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value


class Spikes:
    """Loss-spike detector: more than six deviations above the mean of recent losses."""

    def __init__(self, window: int = 100) -> None:
        self.recent: deque[float] = deque(maxlen=window)

    def judge(self, loss: float) -> str | None:
        """Return a warning if `loss` is a spike."""
        found = None
        if len(self.recent) == self.recent.maxlen:
            mean = sum(self.recent) / len(self.recent)
            deviation = (sum((x - mean) ** 2 for x in self.recent) / len(self.recent)) ** 0.5
            if loss > mean + 6 * max(deviation, 0.01):
                found = f"the loss jumped to {loss:.3f}; the last {len(self.recent)} averaged {mean:.3f}"
        self.recent.append(loss)
        return found


def check_packages(tensorboard: bool, wandb: str | None) -> None:
    """Raise an InputError early if TensorBoard or wandb is asked for but not installed."""
    for wanted, package in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if wanted and not find_spec(package):
            raise InputError(f"{package}={wanted} needs the package {package}: pip install {package}")


class TensorBoard(Callback):
    """TensorBoard logger, in `OUT/tensorboard`."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def on_step(self, progress: Progress) -> None:
        for name, value in asdict(progress).items():
            if isinstance(value, float) and name not in ("seconds", "seconds_left"):
                self.writer.add_scalar(name, value, progress.step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        for name, value in evaluation.figures().items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        self.writer.close()


class Wandb(Callback):
    """Weights & Biases logger."""

    def __init__(self, project: str) -> None:
        import wandb

        self.project, self.wandb = project, wandb

    def on_start(self, run: dict[str, Any]) -> None:
        self.run = self.wandb.init(project=self.project, config=run)

    def on_step(self, progress: Progress) -> None:
        self.run.log({key: value for key, value in asdict(progress).items() if value is not None}, step=progress.step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.run.log(evaluation.figures(), step=step)

    def on_end(self) -> None:
        self.run.finish()
