"""Rollouts: sampled completions of a step's prompts, with rewards and advantages.

They are a function of (weights, seed, step): every prompt has its own sampling seed, and tokens do not depend on what
else is in the batch (batch invariance). The samples of a group share the KV-cache pages of their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ..errors import InputError
from ..serving.llm import LLM
from ..serving.sampling_params import SamplingParams
from .config import RLConfig
from .prompts import Prompts, encode_prompt, sample_seed

Score = Callable[[list[dict[str, Any]]], list[float]]
DEVIATION = 1e-4  # added to a group's standard deviation, as TRL does


@dataclass(slots=True)
class Sample:
    """A sampled answer: all tokens from the prompt on, the indices of sampled ones, and their log-probabilities."""

    prompt: str
    text: str
    tokens: list[int]
    sampled: Sequence[int]
    logprobs: list[float]
    ended: bool
    reward: float = 0.0
    advantage: float = 0.0


@dataclass(slots=True)
class Rollouts:
    """This process's samples of a step, group by group."""

    samples: list[Sample]
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of sampled tokens."""
        return sum(len(sample.sampled) for sample in self.samples)


def roll_out(llm: LLM, prompts: Prompts, numbers: Iterable[int], step: int, config: RLConfig, score: Score) -> Rollouts:
    """Sample a group of completions for each prompt, and set rewards and advantages."""
    rows = [prompts.row(number) for number in numbers]
    asked = [encode_prompt(llm, row["prompt"]) for row in rows]
    for row, ids in zip(rows, asked):
        if len(ids) >= llm.max_seq_len:
            raise InputError(
                f"a prompt has {len(ids)} tokens, which leaves no room for an answer in max_seq_len={llm.max_seq_len}: "
                f"{str(row['prompt'])[:100]!r}"
            )
    params = [
        SamplingParams(config.max_tokens, n=config.group, seed=sample_seed(config.seed, step, number), logprobs=0)
        for number in numbers
    ]
    samples, facts = [], []
    for row, ids, output in zip(rows, asked, llm.generate(asked, params)):
        for choice in output.choices:
            tokens = ids + list(choice.token_ids)
            likely = [entry.logprob for entry in choice.logprobs]
            shown = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1].get("content")
            places, ended = range(len(ids), len(tokens)), choice.finish_reason == "stop"
            samples.append(Sample(str(shown), choice.text, tokens, places, likely, ended))
            facts.append({**row, "row": row, "completion": choice.text, "ended": ended})
    for sample, reward in zip(samples, score(facts)):
        sample.reward = reward
    for start in range(0, len(samples), config.group):
        set_advantages(samples[start : start + config.group], config.normalize)
    return Rollouts(samples)


def set_advantages(group: list[Sample], normalize: str = "mean") -> None:
    """Group-relative advantages: reward minus the mean (Dr. GRPO); "std" also divides by the deviation (GRPO)."""
    rewards = [sample.reward for sample in group]
    mean = fmean(rewards)
    scale = 1.0 if normalize == "mean" else 1 / (pstdev(rewards) * (len(group) / (len(group) - 1)) ** 0.5 + DEVIATION)
    alike = min(rewards) == max(rewards)  # equal rewards: their mean may differ by a rounding error
    for sample in group:
        sample.advantage = 0.0 if alike else (sample.reward - mean) * scale
