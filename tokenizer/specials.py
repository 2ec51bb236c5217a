"""Special tokens: markers such as <|endoftext|> that stand outside the text.

They are looked for only when the caller allows them, so that a user's text can never forge one. Where several could
match, the leftmost wins, then the longest.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import regex

# Which tokens begin and end a text, where no file says so: the first of these names that the vocabulary holds.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "<|im_end|>", "<|eot_id|>")
_BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<BOS>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # what a chat model says after its turn, whatever files say


class SpecialTokens:
    """The special tokens of a vocabulary and the ways to find them in text."""

    def __init__(self, ids: dict[str, int]) -> None:
        for token, token_id in ids.items():
            if not isinstance(token, str) or not token:
                raise ValueError(f"special token {token!r} must be a string of at least one character")
            if not 0 <= token_id < 1 << 28:
                raise ValueError(f"special token {token!r} has id {token_id}; ids go from 0 to {(1 << 28) - 1}")
        self.ids = dict(ids)
        self.texts = {token_id: token for token, token_id in ids.items()}
        if len(self.texts) != len(self.ids):
            raise ValueError(f"special_tokens gives one id to several tokens: {ids}")
        self.eos: str | None = next((name for name in _END_NAMES if name in ids), None)
        self.bos: str | None = next((name for name in _BEGIN_NAMES if name in ids), None)
        self.stops: frozenset[int] = frozenset()  # ids that config files name as ends besides `eos`
        self.plain: set[str] = set()  # added tokens that are not special to Hugging Face, kept for saving

    def allowed(self, allowed_special: str | Iterable[str]) -> dict[str, int]:
        """The tokens that `allowed_special` lets text contain, with their ids."""
        if allowed_special == "none":
            return {}
        if allowed_special == "all":
            return self.ids
        if isinstance(allowed_special, str):
            raise ValueError(f'allowed_special is {allowed_special!r}; it must be "none", "all" or a set of tokens')
        names = set(allowed_special)
        if unknown := sorted(names - self.ids.keys()):
            raise ValueError(f"allowed_special names {unknown[0]!r}, but the special tokens are {sorted(self.ids)}")
        return {name: self.ids[name] for name in names}

    def split(self, text: str, allowed: dict[str, int]) -> Iterator[tuple[str, int | None]]:
        """Stretches of ordinary text, each with None, and special tokens, each with its id, in order."""
        position = 0
        for match in finder(frozenset(allowed)).finditer(text):
            if match.start() > position:
                yield text[position : match.start()], None
            yield match.group(), allowed[match.group()]
            position = match.end()
        if position < len(text):
            yield text[position:], None

    def begin_of_text(self) -> int | None:
        return self.ids.get(self.bos) if self.bos else None

    def end_of_text(self) -> int | None:
        return self.ids.get(self.eos) if self.eos else None

    def stop_ids(self) -> frozenset[int]:
        """Every id after which a model has said what it had to say: ends of text and ends of a turn."""
        end = self.end_of_text()
        turns = {self.ids[name] for name in _TURN_ENDS if name in self.ids}
        return self.stops | turns | (set() if end is None else {end})

    def roles(self) -> dict[str, str]:
        """What chat templates and `tokenizer_config.json` call the tokens that begin and end a text."""
        return {role: token for role, token in (("bos_token", self.bos), ("eos_token", self.eos)) if token}


@lru_cache(maxsize=64)
def finder(tokens: frozenset[str]) -> regex.Pattern:
    """A pattern that finds the leftmost, then longest, of the tokens."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")


def cut_stream(
    pieces: Iterable[str], allowed: Iterable[str], ordinary_cut: Callable[[str, int], int], size: int
) -> Iterator[str]:
    """Regroup a stream of text into blocks of about `size` that can be treated one by one, as if they were one text.

    `ordinary_cut(text, limit)` gives the last position up to `limit` where ordinary text may be cut. What comes after
    the cut waits for more, together with as much as a special token might need to become visible.
    """
    find = finder(frozenset(allowed)).finditer if allowed else lambda text: ()
    longest = max(map(len, allowed), default=1)
    held: list[str] = []
    length, wanted = 0, size
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length < wanted:
            continue
        text = "".join(held)
        cut = _cut_between(text, length - longest, find(text), ordinary_cut)
        if cut:
            yield text[:cut]
        held, length = [text[cut:]], length - cut
        wanted = size if cut else 2 * length  # a run that cannot be cut is looked at log(n) times, not n
    if length:
        yield "".join(held)


def _cut_between(text: str, limit: int, specials: Iterable, ordinary_cut: Callable[[str, int], int]) -> int:
    """The last position up to `limit` (or just after a special token) where the text may be cut; 0 if there is none."""
    start, end = 0, len(text)
    for match in specials:
        if match.start() >= limit:
            end = match.start()
            break
        start = match.end()
    if start >= limit:
        return start
    return start + ordinary_cut(text[start:end], limit - start)
