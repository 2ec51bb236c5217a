"""`warploom rl`: reinforcement learning (GRPO) with a reward function, a task, or an environment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro

from ..errors import InputError
from ..rl.config import RLConfig
from ..training.config import BUDGETS
from .flag_errors import Parser
from .flags import parse
from .train import NOTHING, callback, check_given, saved_settings

Hidden = tyro.conf.Suppress
TRUNCATES = "--temperature", "--top-k", "--top-p", "--min-p"


@dataclass(frozen=True)
class RLFlags(RLConfig):
    """Reinforcement learning (GRPO): sample a group of answers a prompt, reinforce those better than their mean."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """JSON lines, each with a "prompt" (a text, or messages) and columns for the reward; or tasks:NAME, fresh problems
    of a task."""
    init_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """The model directory to start from."""
    batch_size: Annotated[int, tyro.conf.arg(name="prompts")] = 16
    """Prompts of one step, over all processes."""
    resume: bool = False
    """Continue from the last complete checkpoint in `out`, with the flags of that run unless given again; without a
    checkpoint, start."""

    model: Hidden[None] = None
    preset: Hidden[str] = RLConfig.preset
    tokenizer: Hidden[str] = RLConfig.tokenizer
    splits: Hidden[tuple[float, ...]] = RLConfig.splits
    epochs: Hidden[float | None] = None
    tokens: Hidden[int | None] = None
    grad_accum_steps: Hidden[int] = 1
    context: Hidden[int | None] = None
    order: Hidden[str] = RLConfig.order
    stride: Hidden[int | None] = None
    num_workers: Hidden[int] = RLConfig.num_workers
    loss: Hidden[str] = RLConfig.loss
    beta: Hidden[float] = RLConfig.beta
    label_smoothing: Hidden[float] = 0.0
    z_loss: Hidden[float] = 0.0
    ema: Hidden[float] = 0.0
    tp: Hidden[int] = 1
    ep: Hidden[int] = 1
    compile: Hidden[bool] = False
    eval_batches: Hidden[int] = RLConfig.eval_batches
    sample_prompt: Hidden[str | None] = None
    sample_tokens: Hidden[int] = RLConfig.sample_tokens

    def __post_init__(self) -> None:
        """No check here: RLConfig checks."""


def run(argv: list[str]) -> int:
    config = read(argv)
    from ..rl.trainer import run_reinforce

    result = run_reinforce(config, [callback()])
    if result.stopped_by:
        return 130 if result.stopped_by == "SIGINT" else 143
    found = [line["accuracy"] for line in result.history if "accuracy" in line]
    rewards = [line["reward"] for line in result.history if "reward" in line]
    told = f"accuracy on fresh problems {found[0]:.3f} → {found[-1]:.3f}" if found else ""
    if rewards:  # only the leader of many processes has some
        print(f"{result.directory}: {told or f'reward {rewards[0]:.3f} → {rewards[-1]:.3f}'}")
    return 0


def read(argv: list[str]) -> RLConfig:
    """Parse a command line into an `RLConfig`."""
    for flag in (word.partition("=")[0] for word in argv):
        if flag in TRUNCATES:
            raise InputError(
                f"{flag} is not for rl: samples are untruncated at temperature 1, for others come from another policy "
                "than the one whose gradient is taken"
            )
    early = Parser(prog="warploom rl", add_help=False, allow_abbrev=False)
    early.add_argument("--out", default=RLConfig.out)
    early.add_argument("--resume", action="store_true")
    for name in BUDGETS:
        early.add_argument(f"--{name}")
    given = early.parse_known_args(argv)[0]
    fields = {field.name for field in dataclasses.fields(RLConfig)}
    saved = saved_settings(given.out, None) if given.resume else {}
    if any(getattr(given, name) for name in BUDGETS):
        saved = {name: value for name, value in saved.items() if name not in BUDGETS}
    saved = {
        name: tuple(value) if isinstance(value, list) else value for name, value in saved.items() if name in fields
    }
    none = NOTHING if given.resume and not saved else tyro.MISSING
    flags = parse(RLFlags, argv, "rl", RLFlags(**{"data": none, **saved}))
    check_given(flags.data, flags.out)
    return RLConfig(**{name: getattr(flags, name) for name in fields})
