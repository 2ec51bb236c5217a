"""Structured output: only tokens that keep the text inside a grammar are possible.

`llguidance` compiles a JSON schema, a regular expression or a list of choices into a matcher that says, before each
token, which tokens may come. Compiling happens on the caller's side, before the request reaches the loop, and within a
time limit: a hostile schema costs its sender an error and nobody else a step. When the grammar is complete the request
ends, whether or not the model would have gone on; one that grows out of llguidance's limits on the way ends its own
request, with an error.
"""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .params import SamplingParams

TIME_LIMIT = 10.0  # seconds to compile a grammar


class Grammar:
    """Where one continuation stands in its grammar."""

    def __init__(self, matcher, vocabulary: int):
        self._matcher = matcher
        self.error: Exception | None = None
        self._mask = np.zeros((vocabulary + 31) // 32, dtype=np.int32)
        self._vocabulary = vocabulary

    @property
    def finished(self) -> bool:
        """Whether nothing more can come."""
        return self.error is not None or self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        if not self.finished and not self._matcher.consume_token(token):
            self.error = RuntimeError(f"the grammar refused token {token}: {self._matcher.get_error()}")

    def mask(self, logits_V: Tensor) -> None:
        """Make impossible, in place, every token that would leave the grammar."""
        if self.finished:
            return
        try:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        except ValueError as error:
            self.error = error
            return
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        logits_V.masked_fill_(~torch.from_numpy(allowed).bool().to(logits_V.device), -torch.inf)


def compile_grammar(params: SamplingParams, tokenizer, vocabulary: int) -> Callable[[], Grammar]:
    """A maker of fresh matchers for what the request asks; raises ValueError for what cannot be compiled."""
    try:
        import llguidance
    except ImportError:
        raise ValueError("json_schema, regex and choice need the package llguidance: pip install llguidance") from None
    if tokenizer is None or tokenizer.eos_id is None:
        raise ValueError("json_schema, regex and choice need a tokenizer with an end-of-text token")
    field = next(name for name in ("json_schema", "regex", "choice") if getattr(params, name) is not None)

    def build():
        source = _source(llguidance.LLMatcher, field, getattr(params, field))
        matcher = llguidance.LLMatcher(_vocabulary(tokenizer, vocabulary), source, log_level=0)
        trial = matcher.deep_copy()
        with contextlib.suppress(ValueError):  # what is too large from the start shows here
            trial.compute_bitmask()
        if trial.is_error():
            raise ValueError(f"{field} cannot be compiled: {trial.get_error().splitlines()[0]}")
        return matcher

    pool = ThreadPoolExecutor(1)
    try:
        matcher = pool.submit(build).result(TIME_LIMIT)
    except TooLong:
        raise ValueError(f"{field} takes more than {TIME_LIMIT:.0f} seconds to compile: simplify it") from None
    finally:
        pool.shutdown(wait=False)
    return lambda: Grammar(matcher.deep_copy(), vocabulary)


def _source(matcher, field: str, value) -> str:
    try:
        if field == "regex":
            return matcher.grammar_from_regex(value)
        if field == "choice":
            return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
        return matcher.grammar_from_json_schema(json.loads(value), defaults={"whitespace_flexible": False})
    except ValueError as error:
        raise ValueError(f"{field} cannot be compiled: {error}") from None


@lru_cache(maxsize=4)
def _vocabulary(tokenizer, size: int):
    """The tokens as llguidance wants them: bytes by id, special ones marked by a byte that text never has."""
    import llguidance

    special = tuple(tokenizer.special_tokens.values())
    token_bytes = tuple(_token_bytes(tokenizer, token, special) for token in range(size))

    class Tokens:
        eos_token_id = tokenizer.eos_id
        bos_token_id = None
        special_token_ids = special
        tokens = token_bytes

        def __call__(self, text):
            return tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), n_vocab=size)


def _token_bytes(tokenizer, token: int, special: tuple[int, ...]) -> bytes:
    try:
        text = tokenizer.token_bytes(token)
    except (ValueError, KeyError, IndexError):  # the model's table is larger than the vocabulary
        return b""
    return b"\xff" + text if token in special else text
