"""Added tokens: strings that are one token wherever they occur, matched before pretokenization.

There are two kinds, as in `tokenizers`. *Special* tokens such as <|endoftext|> are markup outside the text: they are
recognized only when the caller allows them, so that a user's text can never forge one. *Plain* ones (runs of spaces in
phi-2, <table> in Gemma, <tool_call> in Qwen) are vocabulary like any other and always match. Where several could
match, the leftmost wins, then the longest. Some take the white space before (`lstrip`) or behind them (`rstrip`) along.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Literal

import regex

from .errors import InputError

Follows = Literal["start", "added", "text"]  # what stands before a stretch of text: nothing, an added token, other text

# Which tokens begin and end a text, where no file says so: the first of these names that the vocabulary holds.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "<|im_end|>", "<|eot_id|>")
_BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<BOS>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # what a chat model says after its turn, whatever files say
_SPACES = regex.compile(r"\s*")
_SPACES_BACKWARD = regex.compile(r"(?r)\s*")


class SpecialTokens:
    """The added tokens of a vocabulary, their flags and roles, and how to find them in text."""

    def __init__(self, ids: dict[str, int]) -> None:
        for token, token_id in ids.items():
            if not isinstance(token, str) or not token:
                raise InputError(f"special token {token!r} must be a string of at least one character")
            if not 0 <= token_id < 1 << 28:
                raise InputError(f"special token {token!r} has id {token_id}; ids go from 0 to {(1 << 28) - 1}")
        self.ids = dict(ids)
        self.texts = {token_id: token for token, token_id in ids.items()}
        if len(self.texts) != len(self.ids):
            raise InputError(f"special_tokens gives one id to several tokens: {ids}")
        self.eos: str | None = next((name for name in _END_NAMES if name in ids), None)
        self.bos: str | None = next((name for name in _BEGIN_NAMES if name in ids), None)
        self.stops: frozenset[int] = frozenset()  # ids that config files name as ends besides `eos`
        self.plain: frozenset[str] = frozenset()  # vocabulary, not markup: they match in any text
        self.lstrip: frozenset[str] = frozenset()
        self.rstrip: frozenset[str] = frozenset()
        self.normalized: frozenset[str] = frozenset()  # looked for after normalization, not before

    def with_ids(self, ids: dict[str, int]) -> "SpecialTokens":
        """Copy with other ids."""
        changed = SpecialTokens(ids)
        for name in ("stops", "plain", "lstrip", "rstrip", "normalized"):
            setattr(changed, name, getattr(self, name))
        changed.bos, changed.eos = self.bos or changed.bos, self.eos or changed.eos
        return changed

    def allowed(self, allowed_special: str | Iterable[str]) -> dict[str, int]:
        """Added tokens that text may contain, with ids: plain ones and those that `allowed_special` names."""
        if allowed_special == "all":
            return self.ids
        if allowed_special == "none":
            return {name: self.ids[name] for name in self.plain}
        if isinstance(allowed_special, str):
            raise InputError(f'allowed_special is {allowed_special!r}; it must be "none", "all" or a set of tokens')
        names = set(allowed_special)
        if unknown := sorted(names - self.ids.keys()):
            raise InputError(f"allowed_special names {unknown[0]!r}, but the special tokens are {sorted(self.ids)}")
        return {name: self.ids[name] for name in names | self.plain}

    def find(self, text: str, allowed: Iterable[str]) -> Iterator[tuple[int, int, str]]:
        """Yield (begin, end, token) of each added token in a text, with the white space it strips."""
        done = 0
        for start, end in finder(frozenset(allowed)).finditer(text):
            token = text[start:end]
            if token in self.lstrip:
                before = _SPACES_BACKWARD.match(text, 0, start)
                start = max(done, before.start()) if before else start
            if token in self.rstrip:
                after = _SPACES.match(text, end)
                end = after.end() if after else end
            yield start, end, token
            done = end

    def split(self, text: str, allowed: dict[str, int]) -> Iterator[tuple[str, int | None]]:
        """Split a text at added tokens: (stretch, None) or (token, id), in order."""
        position = 0
        for start, end, token in self.find(text, allowed):
            if start > position:
                yield text[position:start], None
            yield text[start:end], allowed[token]
            position = end
        if position < len(text):
            yield text[position:], None

    def to_json(self) -> list[dict]:
        """The `added_tokens` of a tokenizer.json."""
        return [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": token in self.lstrip,
                "rstrip": token in self.rstrip,
                "normalized": token in self.normalized,
                "special": token not in self.plain,
            }
            for token, token_id in sorted(self.ids.items(), key=lambda item: item[1])
        ]

    def begin_of_text(self) -> int | None:
        return self.ids.get(self.bos) if self.bos else None

    def end_of_text(self) -> int | None:
        return self.ids.get(self.eos) if self.eos else None

    def stop_ids(self) -> frozenset[int]:
        """Ids after which generation stops: ends of text and ends of turn."""
        end = self.end_of_text()
        turns = {self.ids[name] for name in _TURN_ENDS if name in self.ids}
        return self.stops | turns | (set() if end is None else {end})

    def roles(self) -> dict[str, str]:
        """Role names (`bos_token`, `eos_token` …) of added tokens, as in `tokenizer_config.json`."""
        return {role: token for role, token in (("bos_token", self.bos), ("eos_token", self.eos)) if token}


class Finder:
    """Multi-string matcher, leftmost-longest; thousands of strings cost no more than one."""

    def __init__(self, tokens: frozenset[str]) -> None:
        self._tokens = tokens
        self._lengths: dict[str, list[int]] = {}
        for length in sorted({len(token) for token in tokens}, reverse=True):
            for first in {token[0] for token in tokens if len(token) == length}:
                self._lengths.setdefault(first, []).append(length)
        self._first = regex.compile(f"[{''.join(map(regex.escape, self._lengths))}]" if tokens else r"(?!)")

    def finditer(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of each occurrence."""
        position = 0
        while match := self._first.search(text, position):
            start = match.start()
            lengths = (n for n in self._lengths[match.group()] if text[start : start + n] in self._tokens)
            position = start + next(lengths, 0)
            if position > start:
                yield start, position
            else:
                position += 1

    def split(self, text: str) -> Iterator[str]:
        """Split a text into matches and what is between them."""
        position = 0
        for start, end in self.finditer(text):
            yield text[position:start]
            position = end
        yield text[position:]


finder = lru_cache(maxsize=64)(Finder)


def cut_stream(
    pieces: Iterable[str],
    special: SpecialTokens,
    allowed: Iterable[str],
    ordinary_cut: Callable[[str, int], int],
    size: int,
) -> Iterator[tuple[str, Follows]]:
    """Re-chunk a text stream into blocks of about `size` that can be tokenized independently.

    `ordinary_cut(text, limit)` gives the last position up to `limit` where ordinary text may be cut. What comes after
    the cut waits for more, together with as much as an added token might need to become visible.
    """
    longest = max(map(len, allowed), default=1)
    held: list[str] = []
    length, wanted = 0, size
    follows: Follows = "start"
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length < wanted:
            continue
        text = "".join(held)
        found = special.find(text, allowed) if allowed else ()
        cut, behind = _cut_between(text, length - longest, found, ordinary_cut)
        if cut:
            yield text[:cut], follows
            follows = behind
        held, length = [text[cut:]], length - cut
        wanted = size if cut else 2 * length  # a run that cannot be cut is looked at log(n) times, not n
    if length:
        yield "".join(held), follows


def _cut_between(
    text: str, limit: int, found: Iterable[tuple[int, int, str]], ordinary_cut: Callable[[str, int], int]
) -> tuple[int, Follows]:
    """Last position up to `limit` (or just after an added token) where the text may be cut; 0 if there is none."""
    begin, end = 0, len(text)
    for start, stop, _ in found:
        if start >= limit or stop == len(text):  # white space that a token takes along may go on
            end = start
            break
        begin = stop
    cut = 0 if begin >= limit else ordinary_cut(text[begin:end], min(limit, end) - begin)
    return begin + cut, "text" if cut else "added"
