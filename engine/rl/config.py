"""Configuration of reinforcement learning: `TrainConfig` plus rewards, groups and sampling. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..training.config import TrainConfig


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Reinforcement learning run (GRPO). `data` names the prompts; `batch_size` counts the prompts of one step over all
    processes. Samples are always drawn at temperature 1 without truncation: anything else would sample from another
    policy than the one whose gradient is taken."""

    out: str = "runs/rl"
    """Directory of the run: a model directory with its checkpoints, log and curves."""
    reward: tuple[str, ...] = ()
    """Reward functions, each FILE.py:function; none = the score of the task."""
    reward_weights: tuple[float, ...] = ()
    """A factor for each reward function; none = 1 each."""
    reward_seconds: float = 60.0
    """Longest time that one call of a reward function may take."""
    environment: str | None = None
    """Multi-turn environment, FILE.py:Class, which replies to answers and ends with a reward; instead of `reward`
    (engine/rl/environments.py has an example)."""
    turns: int = 8
    """Maximum turns (answers of the model) of an episode with an environment."""
    group: int = 16
    """Samples a prompt (GRPO's group size); advantages are relative to their mean reward."""
    max_tokens: int = 64
    """Maximum tokens of a sample (of each answer, with an environment)."""
    normalize: Literal["mean", "std"] = "mean"
    """Advantages: mean = reward minus the group's mean (Dr. GRPO); std = that divided by the group's standard deviation
    (GRPO). The loss is averaged over all tokens of the step."""
    kl: float = 0.0
    """Weight of the KL penalty towards the starting weights, which are kept as a second (reference) model; with LoRA
    the base is the reference and no second model is needed."""
    updates: int = 1
    """Optimizer steps on the same samples; more than one makes them off-policy, and ratios are clipped."""
    clip: float = 0.2
    """PPO clipping range of importance ratios, with several updates: a token beyond it has no gradient."""
    exact: bool | None = None
    """Compute log-probabilities in training with the very bits of sampling: in float32 on a CPU; on a GPU, by
    batch-invariant products, only if True. None = on a CPU, where possible."""
    max_mismatch: float = 0.015
    """Stop the run if the KL divergence (k3 estimate) between sampler and trainer exceeds this."""
    max_batch: int = 256
    """Samples generated concurrently; does not change them."""
    micro_tokens: int = 16384
    """Tokens of a micro-batch of the update."""
    eval_problems: int = 100
    """Fresh problems of the task in an evaluation; 0 = none."""

    steps: int | None = None
    """Steps, each with its own rollouts. With neither steps nor minutes: 100."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int | None = 5
    """Steps of linear warm-up from 0: AdamW's first steps have full size however noisy the gradient is."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors never decay."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of weights and activations. auto = float32 on a CPU, where training is then exactly on-policy
    (`exact`); bfloat16 on a GPU that is made for it."""
    save_every: int = 20
    """Steps between checkpoints; 0 = only at the end or when stopped."""
    eval_every: int = 0
    """Steps between evaluations; 0 = only at the beginning and at the end."""
    sample_every: int = 10
    """Steps between samples that are shown; 0 = only at the end."""
    log_every: int = 1
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = (
            ("init_from", self.init_from is not None, "the model to start from (--from MODEL)"),
            ("group", 2 <= self.group <= 256, "between 2 and 256: samples are compared with each other"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("updates", self.updates >= 1, "at least 1"),
            ("turns", self.turns >= 1, "at least 1"),
            ("environment", self.environment is None or not self.reward, "alone: it gives the rewards itself"),
            ("clip", 0 < self.clip < 1, "between 0 and 1"),
            ("kl", self.kl >= 0, "at least 0"),
            ("reward_seconds", self.reward_seconds > 0, "more than 0"),
            ("max_mismatch", self.max_mismatch > 0, "more than 0"),
            ("max_batch", self.max_batch >= 1, "at least 1"),
            ("micro_tokens", self.micro_tokens >= 1, "at least 1"),
            ("eval_problems", self.eval_problems >= 0, "at least 0"),
            ("tp and ep", self.tp == self.ep == 1, "1: the server holds whole weights; use dp or fsdp"),
            ("epochs and tokens", self.epochs is None and self.tokens is None, "none: give steps or minutes"),
            ("grad_accum_steps", self.grad_accum_steps == 1, "1: micro_tokens cuts an update"),
        )
        for name, holds, words in fields:
            if not holds:
                value = getattr(self, name, None)
                raise InputError(f"{name} must be {words}{'' if value is None else f', not {value}'}")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise InputError(f"reward_weights has {len(self.reward_weights)} entries for {len(self.reward)} rewards")
