"""Sampling parameters: a frozen dataclass, validated on creation.

Every field is checked in `__post_init__`, so a request that exists is a request that can be served; what depends on the
model (context length, vocabulary) is checked when the request meets it, in `requests.py`.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

MAX_LOGPROBS = 100
MAX_N = 256
GRAMMARS = ("json_schema", "regex", "choice", "grammar")  # fields that say which texts are possible
GREEDY_BELOW = 1e-4  # as in kernels/sample.py: logits over such a temperature differ by more than any draw can bridge


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters: temperature and truncation, penalties, stop conditions, log-probabilities, grammars."""

    max_tokens: int | None = 128
    """Maximum tokens to generate; None: until the context is full. The context length always limits it too."""
    temperature: float = 1.0
    """Softmax temperature; 0, or less than 0.0001, is greedy."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Nucleus sampling: keep the fewest most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides (or, below zero, multiplies) the logits of tokens already in the prompt or the output; 0.01 at least."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it is in the output."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; -100 bans a token in effect, 100 forces it."""
    stop: tuple[str, ...] = ()
    """Stop strings: the text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with any of these tokens, which is not shown in the text."""
    ignore_eos: bool = False
    """Continue after the end-of-text token."""
    min_tokens: int = 0
    """Tokens to generate before one may end the generation (a stop string still may)."""
    seed: int | None = None
    """Same request and same seed, same tokens; None draws a new seed for each request."""
    n: int = 1
    """Continuations of the prompt to generate."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely alternatives."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens, with this many most likely alternatives."""
    json_schema: str | None = None
    """Structured output: JSON that satisfies this schema (in code, a dict will do)."""
    regex: str | None = None
    """Structured output: text that matches this regular expression."""
    choice: tuple[str, ...] | None = None
    """Structured output: one of these strings."""
    grammar: str | None = None
    """Structured output: text of this grammar, in llguidance's variant of Lark."""
    echo: bool = False
    """Put the prompt in front of the text."""

    def __post_init__(self):
        for name in ("stop", "stop_token_ids", "choice"):
            value = getattr(self, name)
            if name != "stop_token_ids" and isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, (list, set)):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.json_schema, (dict, bool)):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        self._check_numbers()
        self._check_collections()
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def greedy(self) -> bool:
        """Return whether sampling is greedy (temperature 0)."""
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Return whether a penalty depends on earlier tokens."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def constrained(self) -> bool:
        """Return whether a grammar constrains the tokens."""
        return any(getattr(self, name) is not None for name in GRAMMARS)

    def _check_numbers(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _integer("n", self.n, 1, MAX_N)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_collections(self) -> None:
        for name in ("stop", "choice"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, tuple) and all(isinstance(s, str) and s for s in value)):
                raise InputError(f"{name} must be strings that are not empty, got {value!r}")
        if not isinstance(self.stop_token_ids, tuple):
            raise InputError(f"stop_token_ids must be a tuple of token ids, got {self.stop_token_ids!r}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise InputError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
            for token, bias in self.logit_bias.items():
                _integer("logit_bias token id", token, 0)
                _number("logit_bias", bias, -100, 100)
        if self.choice == ():
            raise InputError("choice must offer at least one string, got none")
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"only one of {', '.join(GRAMMARS)} can be given, got {' and '.join(given)}")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not (is_int and low <= value and (high is None or value <= high)):
        limits = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be a whole number {limits}, got {value!r}")


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and low <= value <= high) or (open_low and value == low):
        limits = f"above {low} and at most {high}" if open_low else f"between {low} and {high}"
        raise InputError(f"{name} must be a number {limits}, got {value!r}")
