"""Configuration of reinforcement learning: a training run whose data are made by the model. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..training.config import TrainConfig


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """A run of group policy gradient. `data` names the prompts, `batch_size` counts those of one step, over all
    processes. Sampling is always untruncated at temperature 1: whatever else would sample from another policy than the
    one whose gradient is taken."""

    out: str = "runs/rl"
    """Directory of the run: a model directory with its checkpoints, log and curves."""
    reward: tuple[str, ...] = ()
    """Reward functions, FILE.py:function; none = the score of the task."""
    reward_weights: tuple[float, ...] = ()
    """A factor for each reward function; none = 1 each."""
    reward_seconds: float = 60.0
    """Longest time that one call of a reward function may take."""
    environment: str | None = None
    """A class, FILE.py:Class, that answers answers over several turns, instead of a reward (engine/rl/environments.py
    has an example)."""
    turns: int = 8
    """With an environment: most answers of a sample."""
    group: int = 16
    """Samples of a prompt, whose rewards are compared with each other."""
    max_tokens: int = 64
    """Most tokens of a sample."""
    normalize: Literal["mean", "std"] = "mean"
    """The advantage of a sample is its reward minus the group's mean (Dr. GRPO), or that over the group's standard
    deviation too (GRPO). Either is spread over all tokens of the step."""
    kl: float = 0.0
    """Weight of the KL divergence from the starting weights, which are kept for it as a second model; an adapter's base
    is at hand without one."""
    updates: int = 1
    """Optimizer steps on the same samples; more than one makes them off-policy, and ratios are clipped."""
    clip: float = 0.2
    """With several updates: how far a token's probability may move, as a ratio, before its gradient is cut."""
    exact: bool | None = None
    """Let the trainer compute the very bits that sampled: in float32 on a CPU; on a GPU, by batch-invariant products,
    only if True. None = on a CPU where that is possible."""
    max_mismatch: float = 0.015
    """Largest KL estimate (k3) between what sampled and what is trained before the run stops."""
    max_batch: int = 256
    """Samples computed together; does not change them."""
    micro_tokens: int = 16384
    """Tokens of a micro-batch of the update."""
    eval_problems: int = 100
    """Fresh problems of a task that an evaluation asks; 0 = none."""

    steps: int | None = None
    """Steps, each a batch of samples. With neither steps nor minutes: 100."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int | None = 5
    """Steps of linear warm-up from 0: AdamW's first steps move every weight by the whole rate, whatever they know."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors never decay."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of activations and of the weights they meet. auto = float32 on a CPU, where the trainer then computes the
    very bits that sampled; bfloat16 on a GPU that is made for it."""
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
            ("init_from", self.init_from is not None, "name the model to start from (--from DIR)"),
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
