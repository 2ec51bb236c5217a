"""Reinforcement learning benchmark: cost of a step beside TRL's `GRPOTrainer`, and whether thinking is learned.

Both start from the same small base, which is made here of a task's solved problems; both get the same prompts a step,
group, rate and longest answer, and sample untruncated at temperature 1. Times are CPU seconds of the process, which
other programs on the machine disturb least. TRL generates with transformers.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from . import peers
from .harness import Machine, Options, Part
from .schema import Row, Spread

ROOMS = ("engine/rl", "engine/tasks", "engine/training", "engine/serving", "engine/model.py")
DEVICE = "cpu"
MODEL = {"d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "max_seq_len": 96}
SIZES = {"batch_size": 16, "group": 16, "max_tokens": 64}


def parts(options: Options) -> list[Part]:
    """Parts; first the curve of accuracy and answer length."""
    return [
        Part("thinking pays", think, {"task": "sums:8", "learn": 400, "habit": 200, "steps": 40}, minutes=6),
        Part("addition", compare_step, {"task": "addition:2", "learn": 300, "steps": 15}, minutes=3),
    ]


def train_base(out: Path, data: str, steps: int, **changes) -> Path:
    """Train a small character model on solved problems."""
    from ..engine.training import TrainConfig, train

    settings = {"tokenizer": "char", "model": MODEL, "lr": 3e-3, "batch_size": 32, "dtype": "float32", "device": "cpu"}
    settings |= {"eval_every": 0, "sample_tokens": 0, "steps": steps, **changes}
    train(TrainConfig(data=f"tasks:{data}", out=str(out), **settings))
    return out


@contextmanager
def scratch() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


def run_ours(base: Path, task: str, steps: int, out: Path, lr: float, problems: int = 0) -> tuple[list[float], list]:
    """Run our RL; return CPU seconds and metrics of every step."""
    from ..engine.rl import RLConfig
    from ..engine.rl.trainer import RLTrainer

    config = RLConfig(
        f"tasks:{task}", out=str(out), init_from=str(base), steps=steps, device="cpu", save_every=0,
        eval_problems=problems, lr=lr, warmup=0, **SIZES,
    )  # fmt: skip
    trainer, seconds, figures, began = RLTrainer(config, []), [], [], time.process_time()
    for step in trainer.steps():
        seconds.append(time.process_time() - began)
        figures.append(step)
        began = time.process_time()
    return seconds, figures


def think(machine: Machine, task: str, learn: int, habit: int, steps: int) -> list[Row]:
    """RL from a base that knows a scratchpad and seldom uses it, to one that thinks."""
    from ..engine.rl.evaluate import evaluate_task
    from ..engine.serving.llm import LLM
    from ..engine.tasks import open_task

    def ask(model: Path) -> tuple[float, float]:
        llm, asked, answers = LLM(model, device="cpu", dtype="float32", max_batch=256), open_task(task), []

        class Watched:
            name, row, question = asked.name, asked.row, asked.question

            def score(self, answer: str, row: dict) -> float:
                answers.append("<" in answer)
                return asked.score(answer, row)

        found = evaluate_task(llm, Watched(), 500, seed=1 << 41)
        return found.accuracy, sum(answers) / len(answers)

    with scratch() as folder:
        able = train_base(folder / "able", f"{task}:0.6", learn)
        base = train_base(
            folder / "base", f"{task}:0.12", habit, init_from=str(able), tokenizer=str(able), model=None, lr=1.5e-3
        )
        before = ask(base)
        seconds, figures = run_ours(base, task, steps, folder / "run", 3e-4, 100)
        after = ask(folder / "run")
    told = {"accuracy_before": before[0], "accuracy_after": after[0], "thinks_before": before[1]}
    told |= {"thinks_after": after[1], "mismatch": max(step.mismatch for step in figures), "steps": steps}
    told |= {"length_first": figures[0].length, "length_last": figures[-1].length, "cpu_seconds": sum(seconds)}
    return [Row(task, "ours", Spread.of(seconds[1:]), extra=told)]


def compare_step(machine: Machine, task: str, learn: int, steps: int) -> list[Row]:
    """CPU seconds a step, ours and peers', from a base that solves a quarter, so that every step learns."""
    with scratch() as folder:
        base = train_base(folder / "base", task, learn)
        seconds, figures = run_ours(base, task, steps, folder / "run", 1e-4)
        ours = Spread.of(seconds[1:])
        told = {"mixed_groups": min(step.mixed for step in figures), "mismatch": max(step.mismatch for step in figures)}
        rows = [Row(task, "ours", ours, extra=_ends([step.reward for step in figures]) | told)]
        for who, run in peers.build("rl", base, task, steps, {**SIZES, "lr": 1e-4}).items():
            if isinstance(run, peers.Missing):
                rows.append(Row(task, who, missing=run.reason))
                continue
            theirs, rewards = run()
            ratio = Spread.of([second / ours.median for second in theirs[1:]])
            rows.append(Row(task, who, Spread.of(theirs[1:]), ratio=ratio, extra=_ends(rewards)))
    return rows


def _ends(rewards: list[float]) -> dict[str, float]:
    return {"reward_first": sum(rewards[:5]) / 5, "reward_last": sum(rewards[-5:]) / 5}
