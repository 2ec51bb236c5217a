r"""Pretokenizer patterns: how text is cut into pieces that BPE never merges across.

A pattern is a regular expression; its successive matches are the pieces. Without it BPE would spend its vocabulary on
"dog.", "dog!" and "dog?"; with it, "dog" is learned once. Those known by name have hand-written scanners in C++
(csrc/tokenizer/scanner.hpp); any other goes through the `regex` module. Text between matches is a piece too, so no byte
is ever lost.

`gpt2`   letters, digits and signs apart, each with at most one leading space; English contractions apart.
`digits` gpt2 with single digits: first `\p{N}`, then gpt2 (SmolLM, StarCoder2, Granite).
`gpt4`   the same with any case of contraction, digits in groups of three, and newlines that end a piece.
`o200k`  words also break where a lowercase letter meets an uppercase one; a contraction stays with its word.
`qwen2`  gpt4 with single digits; `qwen3.5` takes marks for letters too.
`tekken` o200k with single digits and without contractions (Mistral).
`deepseek` digits in threes first, then kana and Han, then words.
`falcon` runs of punctuation first, then gpt2, then ASCII digits in threes.
`spaces` spaces and the word behind them; with those behind a > too, to which some vocabularies join them. What
         SentencePiece, which does not pretokenize, can be cut into (metaspace.py).
"""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, get_args

import regex

from .errors import InputError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"  # Unicode's, and every ASCII sign
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"

Pattern = str | tuple[str, ...]  # a name, a regular expression, or several of them

PATTERNS: dict[str, Pattern] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL,
    "o200k": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL,
        ]
    ),
    "spaces": r" *(?:[^ ]|(?<=>) +)+| +",
    "qwen2": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL,
    "qwen3.5": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL,
    "tekken": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL,
        ]
    ),
    "deepseek": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}
PATTERNS["digits"] = (r"\p{N}", str(PATTERNS["gpt2"]))
PATTERNS["falcon"] = (PUNCTUATION + "+", str(PATTERNS["gpt2"]), "[0-9][0-9][0-9]")

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]  # Unicode normalization, applied to text before it is cut
FORMS: tuple[Form, ...] = get_args(Form)

_ASCII = regex.compile(r"[\x00-\x7f]")  # characters that compose with nothing before them
_PART = 4096


def compose(text: str, unsafe: regex.Pattern) -> str | None:
    """NFC-normalize a text; None where that would compose or create what `unsafe` matches.

    Part by part, because most parts are ASCII, which need not be looked at: 7 times faster than the whole at once.
    """
    parts, begin = [], 0
    while begin < len(text):
        match = _ASCII.search(text, begin + _PART)
        end = match.start() if match else len(text)
        part = text[begin:end]
        if not unicodedata.is_normalized("NFC", part):
            if unsafe.search(part):
                return None
            part = unicodedata.normalize("NFC", part)
        parts.append(part)
        begin = end
    return "".join(parts)


def composed_with(tokens: Iterable[str]) -> regex.Pattern:
    """Pattern of places where NFC would change which of some ASCII tokens are found: a combining mark behind one, or a
    character that normalizes to ASCII."""
    ends = "".join(sorted({regex.escape(token[-1]) for token in tokens}))
    return regex.compile(rf"[{ends}]\p{{M}}|[\u037e\u1fef\u212a]" if ends else r"(?!)")


# Other spellings of the same languages, found in published tokenizers.
_ALIASES = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL: "gpt4",
}


def pattern_steps(pattern: Pattern) -> tuple[str, ...]:
    """Regular expressions of a pattern; each cuts the pieces of the one before."""
    if isinstance(pattern, tuple):
        return tuple(part for step in pattern for part in pattern_steps(step))
    known = PATTERNS.get(pattern, pattern)
    return (known,) if isinstance(known, str) else known


def pattern_name(pattern: Pattern) -> str | None:
    """Name of the C++ scanner that splits exactly as a pattern does, or None."""
    spellings = (_ALIASES.get(step, step) for step in pattern_steps(pattern))
    steps = tuple(part for step in spellings for part in pattern_steps(step))
    return next((name for name in PATTERNS if pattern_steps(name) == steps), None)


@lru_cache(maxsize=64)
def compile_pattern(pattern: Pattern) -> tuple[regex.Pattern, ...]:
    """Compile the steps of a pattern; an error becomes one sentence."""
    try:
        return tuple(map(regex.compile, pattern_steps(pattern)))
    except regex.error as error:
        names = ", ".join(PATTERNS)
        raise InputError(
            f"pattern {pattern!r} is not a valid regular expression ({error}); known names: {names}"
        ) from None


def split(text: str, pattern: Pattern) -> list[str]:
    """Split `text` into pieces; joined they give `text` back."""
    pieces = [text] if text else []
    for step in compile_pattern(pattern):
        pieces = [part for piece in pieces for part in _split_once(piece, step)]
    return pieces


def _split_once(text: str, step: regex.Pattern) -> Iterator[str]:
    """Yield matches and the text between them."""
    position = 0
    for match in step.finditer(text):
        start, end = match.span()
        if start > position:
            yield text[position:start]
        if end > start:
            yield text[start:end]
        position = end
    if position < len(text):
        yield text[position:]


_CUT = regex.compile(r"(?r)(?<=[\p{L}\p{N}])[^\p{L}\p{N}\p{M}']")
_CUT_AT_SPACE = regex.compile(r"(?r)(?<=[\p{L}\p{N}]) ")


def safe_cut(text: str, limit: int, pattern: Pattern) -> int:
    """Last position up to `limit` where the pattern always cuts, whatever the context; 0 if there is none.

    A letter or digit followed by space or punctuation ends a piece in each of the named patterns; an apostrophe might
    begin a contraction and a combining mark might continue a word, so they are no such place. One character after the
    position must be known, which is why a stream holds a little back. Of other patterns nothing is known.
    """
    name = pattern_name(pattern)
    if name is None:
        return 0
    find = _CUT_AT_SPACE if name == "spaces" else _CUT
    match = find.search(text, 0, min(limit + 1, len(text)))
    return match.start() if match else 0
