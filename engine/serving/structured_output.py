"""Structured output: token masks from JSON schemas, regular expressions, choices and grammars (llguidance).

`llguidance` compiles a JSON schema, a regular expression, a list of choices or a Lark grammar into a matcher that says,
before each token, which tokens may come. Compiling takes milliseconds, happens before a request reaches the loop, in
two threads that take turns by client, and its results are kept: a hostile schema costs its sender an error and nobody
else a step. When the grammar is complete the request ends, whether or not the model would have gone on; one that grows
out of llguidance's limits on the way ends its own request, with an error.
"""

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLong

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .fair_pool import FairPool
from .sampling_params import GRAMMARS, SamplingParams

TIME_LIMIT = 10.0  # seconds to compile a grammar
MOST_BYTES = 1 << 16  # of a grammar's source
CACHED = 64  # compiled grammars that are kept
NAMES = ", ".join(GRAMMARS[:-1]) + f" and {GRAMMARS[-1]}"


class GrammarError(InputError):
    """A grammar exceeded its limits during generation."""


class Grammar:
    """Grammar state of one continuation."""

    def __init__(self, matcher, vocabulary: int):
        self._matcher = matcher
        self.error: Exception | None = None
        self._mask = np.zeros((vocabulary + 31) // 32, dtype=np.int32)
        self._vocabulary = vocabulary

    active = True  # whether the next token is constrained

    @property
    def finished(self) -> bool:
        """Return whether no further token can come: the grammar is complete, or has failed."""
        return self.error is not None or self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Advance by the sampled token."""
        if not self.finished and not self._matcher.consume_token(token):
            self.error = GrammarError(f"the grammar refused token {token}: {_one_line(self._matcher.get_error())}")

    def rewind(self, tokens: list[int]) -> None:
        """Reset to the state after these tokens."""
        self._matcher.reset()
        self._matcher.consume_tokens(tokens)

    def mask(self, logits_V: Tensor) -> None:
        """Mask, in place, the logits of tokens that would violate the grammar."""
        if self.finished:
            return
        try:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        except ValueError as error:
            self.error = GrammarError(_one_line(error))
            return
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        if not allowed.any():
            self.error = GrammarError("no token of the vocabulary continues the grammar")
            return
        logits_V.masked_fill_(~torch.from_numpy(allowed).bool().to(logits_V.device), -torch.inf)


class TriggeredGrammar:
    """Grammar that starts at a trigger in the text and constrains until it is complete; other text is free.

    The grammar describes the text from the mark on. With `first_only` a mark counts at the beginning alone, or behind
    what was bound before. `quiet` are marks around text in which nothing counts, such as reasoning: at the beginning
    alone, or wherever they stand if they are `repeated`; `inside` says that the text begins there.
    """

    error, finished = None, False

    def __init__(
        self,
        make: Callable[[], Grammar],
        tokenizer,
        mark: str,
        first_only: bool = False,
        quiet: tuple[str, str] | None = None,
        inside: bool = False,
        repeated: bool = False,
    ):
        self._make, self._tokenizer, self._mark, self._first_only = make, tokenizer, mark.encode(), first_only
        bounds = quiet and tuple(each.strip().encode() for each in quiet)
        self._start, self._repeated = (bounds, inside), repeated
        self._kept = max(len(self._mark), len(bounds[0]) if bounds else 0)  # bytes that one may have begun in
        self.rewind([])

    @property
    def active(self) -> bool:
        """Return whether the next token is constrained."""
        return self._inner is not None

    def accept(self, token: int) -> None:
        """Advance by the sampled token."""
        if self._inner is not None:
            self._inner.accept(token)
            if self._inner.finished:
                self._begin()
            return
        if self._over:
            return
        self._recent.append((token, _token_bytes(self._tokenizer, token, ())))
        if self._quiet is not None and not self._is_heard(token):
            return
        text = b"".join(data for _, data in self._recent)
        place, before = text.find(self._mark), text.strip(b" \t\r\n;")
        if place >= 0 and not (self._first_only and text[:place].strip(b" \t\r\n;")):
            self._bind(place)
        elif not self._first_only:
            self._forget(self._kept)
        elif not self._mark.startswith(before):
            self._over = True

    def rewind(self, tokens: list[int]) -> None:
        """Reset to the state after these tokens."""
        self._quiet, self._inside = self._start
        self._over = False  # no mark will count any more
        self._begin()
        for token in tokens:
            self.accept(token)

    def mask(self, logits_V: Tensor) -> None:
        """Mask, in place, the logits of tokens that would violate the grammar."""
        if self._inner is not None:
            self._inner.mask(logits_V)

    def _begin(self) -> None:
        self._inner: Grammar | None = None
        self._recent: list[tuple[int, bytes]] = []  # tokens that the mark may have begun in, and their text

    def _is_heard(self, token: int) -> bool:
        """Return whether a trigger at this point counts."""
        opened, closed = self._quiet or (b"", b"")
        text = b"".join(data for _, data in self._recent)
        if not self._inside:
            place = text.find(opened) if self._repeated else len(text) - len(text.lstrip())
            begin = text[place:] if place >= 0 else b""
            if not self._repeated and opened.startswith(begin) and begin != opened:
                return False
            self._inside = begin.startswith(opened)
            if self._inside:
                text = begin.removeprefix(opened)
                self._recent = [(token, text)]
        if self._inside and closed not in text:
            self._forget(len(closed))
            return False
        if self._inside:
            self._recent = [(token, text.partition(closed)[2])]
        self._inside, self._quiet = False, self._quiet if self._repeated else None
        return True

    def _bind(self, place: int) -> None:
        """Start the grammar at the token in which the trigger begins; stop if the text already violates it."""
        while len(self._recent[0][1]) <= place:
            place -= len(self._recent.pop(0)[1])
        tokens, self._inner = [token for token, _ in self._recent], self._make()
        for token in tokens:
            self._inner.accept(token)
        if self._inner.finished:
            self._begin()

    def _forget(self, size: int) -> None:
        """Keep only the tokens that the last `size` bytes lie in."""
        while sum(len(data) for _, data in self._recent[1:]) >= size:
            self._recent.pop(0)


class MinTokens:
    """Mask of the end tokens until `min_tokens` have been generated."""

    error, finished = None, False

    @property
    def active(self) -> bool:
        """Return whether the next token is constrained."""
        return self._seen < self._count

    def __init__(self, count: int, ends: frozenset[int]):
        self._count, self._seen, self._ends = count, 0, sorted(ends)

    def accept(self, token: int) -> None:
        """Advance by the sampled token."""
        self._seen += 1

    def rewind(self, tokens: list[int]) -> None:
        """Reset to the state after these tokens."""
        self._seen = len(tokens)

    def mask(self, logits_V: Tensor) -> None:
        """Mask the end tokens, in place, while it is too early."""
        if self._seen < self._count:
            logits_V[self._ends] = -torch.inf


class GrammarCompiler:
    """Compiler of grammars for one tokenizer and vocabulary size, with an LRU cache."""

    def __init__(self, tokenizer, vocabulary: int):
        self._tokenizer, self._rows = tokenizer, vocabulary
        self._kept: OrderedDict[tuple[str, Hashable], object] = OrderedDict()
        self._building, self._keeping = threading.Lock(), threading.Lock()
        self._ready = self._pool = None

    def prepare(self) -> None:
        """Build the vocabulary that all grammars share, if llguidance is installed: 0.1 s for 49,152 tokens."""
        with contextlib.suppress(InputError):
            self._check()
            self._vocabulary()

    def compile(self, params: SamplingParams) -> Callable[[], Grammar]:
        """Compile a request's grammar into a factory of matchers; raise InputError if it is invalid."""
        try:
            return self.start(params).result(TIME_LIMIT)
        except TooLong:
            raise too_slow(params) from None

    def start(self, params: SamplingParams, client: Hashable = None) -> Future:
        """Compile in the background; raises InputError at once for what is too large, PoolFull if too many wait."""
        self._check()
        field = field_of(params)
        key = (field, getattr(params, field))
        size = sum(map(len, key[1]))  # characters, of a text or of several
        if size > MOST_BYTES:
            raise InputError(f"{field} has {size} characters; at most {MOST_BYTES} are compiled")
        with self._keeping:
            matcher = self._kept.get(key)
        if matcher is None:
            with self._building:
                self._pool = self._pool or FairPool(2, waiting=64, name="warploom-grammar")
            return self._pool.submit(client, self._compile, key)
        future: Future = Future()
        future.set_result(self._maker(matcher))
        return future

    def _compile(self, key: tuple[str, Hashable]) -> Callable[[], Grammar]:
        field, source = key
        with self._keeping:
            matcher = self._kept.get(key)  # another request may have compiled it meanwhile
        if matcher is None:
            matcher = _build(self._vocabulary(), field, source)
        with self._keeping:
            self._kept[key] = matcher
            self._kept.move_to_end(key)
            while len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        return self._maker(matcher)

    def _maker(self, matcher) -> Callable[[], Grammar]:
        return lambda: Grammar(matcher.deep_copy(), self._rows)

    def _check(self) -> None:
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise InputError(f"{NAMES} need the package llguidance: pip install llguidance") from None
        if self._tokenizer is None or self._tokenizer.eos_id is None:
            raise InputError(f"{NAMES} need a tokenizer with an end-of-text token")

    def _vocabulary(self):
        with self._building:
            self._ready = self._ready or _vocabulary(self._tokenizer, self._rows)
            return self._ready


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def field_of(params: SamplingParams) -> str:
    """Name of the field that holds a request's grammar."""
    return next(name for name in GRAMMARS if getattr(params, name) is not None)


def too_slow(params: SamplingParams) -> InputError:
    """Error for a grammar that takes too long to compile."""
    return InputError(f"{field_of(params)} takes more than {TIME_LIMIT:.0f} seconds to compile: simplify it")


def _build(vocabulary, field: str, value):
    import llguidance

    source = _source(llguidance.LLMatcher, field, value)
    matcher = llguidance.LLMatcher(vocabulary, source, log_level=0)
    trial = matcher.deep_copy()
    with contextlib.suppress(ValueError):  # what is too large from the start shows here
        trial.compute_bitmask()
    if trial.is_error():
        raise InputError(f"{field} cannot be compiled: {_one_line(trial.get_error())}")
    return matcher


def _source(matcher, field: str, value) -> str:
    from llguidance.gbnf_to_lark import any_to_lark  # llama.cpp's notation too

    try:
        if field == "regex":
            return matcher.grammar_from_regex(_CLASSES.sub(lambda found: ASCII.get(found[0], found[0]), value))
        if field == "choice":  # one regular expression: linear, where a Lark rule is quadratic and ends at 2,000
            return matcher.grammar_from_regex("|".join(map(_escaped, value)))
        if field == "grammar":
            return matcher.grammar_from_lark(any_to_lark(value))
        return matcher.grammar_from_json_schema(json.loads(value), defaults={"whitespace_flexible": False})
    except Exception as error:  # the converter of GBNF has errors of its own: whatever it says is about this grammar
        raise InputError(f"{field} cannot be compiled: {_one_line(error)}") from None


# As in JSON schemas' patterns: Rust's \d has 760 digits, and a model that may write any of them does.
ASCII = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}
_CLASSES = re.compile(r"\\.", re.DOTALL)


def _escaped(text: str) -> str:
    """Escape a text for Rust's regular expressions, which know fewer escapes than Python's."""
    return "".join(f"\\{sign}" if sign in "\\.+*?()|[]{}^$#&-~/" else sign for sign in text)


def _vocabulary(tokenizer, size: int):
    """The vocabulary as llguidance wants it: bytes by id, special tokens marked by a byte that text never has."""
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
