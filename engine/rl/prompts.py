"""Prompts and the seeds of their samples."""

from __future__ import annotations

from typing import Any

import numpy as np


def encode_prompt(llm: Any, prompt: str | list[dict]) -> list[int]:
    """A prompt as token ids. A text is a message to a model with a chat template, and to any other its beginning."""
    if isinstance(prompt, str) and getattr(llm.tokenizer, "chat_template", None):
        prompt = [{"role": "user", "content": prompt}]
    return llm.encode(prompt) if isinstance(prompt, str) else llm.encode_chat(prompt)


def sample_seed(*numbers: int) -> int:
    """The seed of a prompt's samples, a function of (seed, step, row).

    Noise is keyed by (seed, position): prompts of one length that shared a seed would all roll the same dice.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
