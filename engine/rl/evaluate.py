"""Evaluation on tasks: accuracy, pass@k and multiple choice.

pass@1            mean score of a sample
pass@k            chance that one of k samples is right, without bias from n ≥ k samples (Chen et al., 2021)
multiple choice   the share of rows whose right choice has the highest log-probability, of the rows that have choices
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..errors import InputError
from ..serving.llm import LLM
from ..serving.sampling_params import SamplingParams
from ..tasks import Task
from .prompts import encode_prompt, sample_seed

FRESH = 1 << 31
"""Added to a run's seed, the seed of problems that are in no training data."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of a model on a task."""

    task: str
    problems: int
    samples: int
    accuracy: float
    """Mean score of a sample: pass@1."""
    pass_at: dict[int, float] = field(default_factory=dict)
    length: float = 0.0
    """Mean tokens of an answer."""
    ended: float = 1.0
    """Share of answers that ended by themselves."""
    examples: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Metrics by name, as logged."""
        return {"accuracy": self.accuracy, "answer_length": self.length, "answers_ended": self.ended}

    def __str__(self) -> str:
        more = "".join(f", pass@{k} {share:.3f}" for k, share in self.pass_at.items())
        how = f"{self.length:.1f} tokens an answer, {self.ended:.0%} ended" if self.length else "by likelihood"
        return f"{self.task}: accuracy {self.accuracy:.3f}{more} ({self.problems} problems, {how})"


def evaluate_task(
    llm: LLM,
    task: Task,
    problems: int = 100,
    samples: int = 1,
    *,
    temperature: float = 1.0,
    max_tokens: int = 128,
    seed: int = 0,
) -> TaskResult:
    """Sample answers to the first `problems` rows of a seed, and score them."""
    rows = [task.row(seed, index) for index in range(problems)]
    prompts = [encode_prompt(llm, task.question(row)) for row in rows]
    params = [
        SamplingParams(max_tokens, temperature, n=samples, seed=sample_seed(seed, index)) for index in range(problems)
    ]
    outputs = [output.choices for output in llm.generate(prompts, params)]
    scores = [[task.score(choice.text, row) for choice in choices] for row, choices in zip(rows, outputs)]
    every = [choice for choices in outputs for choice in choices]
    ks = [k for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= samples]
    right = [sum(score >= 1 for score in each) for each in scores]
    return TaskResult(
        task.name,
        problems,
        samples,
        fmean(map(fmean, scores)),
        {k: fmean(pass_at_k(samples, count, k) for count in right) for k in ks},
        fmean(len(choice.token_ids) for choice in every),
        fmean(choice.finish_reason == "stop" for choice in every),
        [
            {"prompt": task.question(row), "answer": choices[0].text, "score": each[0]}
            for row, choices, each in zip(rows[:3], outputs, scores)
        ],
    )


def evaluate_choices(llm: LLM, task: Task, problems: int = 100, seed: int = 0) -> TaskResult:
    """Multiple choice by log-likelihood: the choice with the highest log-probability after the question."""
    rows = [task.row(seed, index) for index in range(problems)]
    if any("choices" not in row for row in rows):
        raise InputError(f"task {task.name!r} has no choices to choose from: leave --choices out")
    scores = []
    for row in rows:
        prompt = encode_prompt(llm, task.question(row))
        texts = [prompt + llm.tokenizer.encode(choice) for choice in row["choices"]]
        likely = [math.fsum(each[len(prompt) - 1 :]) for each in llm.score(texts)]
        scores.append(task.score(row["choices"][likely.index(max(likely))], row))
    return TaskResult(task.name, problems, 1, fmean(scores))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased pass@k: the chance that k of these samples, drawn without replacement, include a right one."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
