"""Character and word tokenizers, for small models and for learners.

`CharTokenizer` is what a first model is trained with: a few dozen ids for an English novel, a few thousand for a
Chinese one. `WordTokenizer` shows the opposite end: short sequences, a large vocabulary, and words it has never seen.
BPE is the bridge between the two. Characters and words the corpus did not contain become the unknown token.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex

from .base import Tokenizer, id_array
from .errors import InputError
from .sources import Corpus, documents, read_pieces
from .specials import SpecialTokens, cut_stream, finder
from .stream import StreamDecoder

Span = tuple[int, int]

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"

_WORD_PATTERN = r"[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]"
_WORD = regex.compile(_WORD_PATTERN)
_LAST_SPACE = regex.compile(r"(?r)\s")


class _Vocabulary(Tokenizer):
    """Base of tokenizers whose tokens are whole strings in a dictionary."""

    def __init__(
        self,
        vocab: dict[str, int],
        special_tokens: dict[str, int] | SpecialTokens | None = None,
        unknown: str = UNK,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(special_tokens, chat_template)
        if unknown not in self.special.ids:
            raise InputError(f"special_tokens lacks the unknown token {unknown!r}: {sorted(self.special.ids)}")
        self._vocab = dict(vocab)
        self._tokens = {token_id: token for token, token_id in vocab.items()}
        if len(self._tokens) != len(vocab) or self._tokens.keys() & self.special.texts.keys():
            raise InputError("vocab gives one id to several tokens; each token needs an id of its own")
        self.unknown, self.unknown_id = unknown, self.special.ids[unknown]

    @property
    def vocab(self) -> dict[str, int]:
        """Ordinary tokens and their ids."""
        return self._vocab

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokens.get(token_id) or self.special.texts.get(token_id)
        if token is None:
            raise self._bad_id(token_id)
        return token.encode()

    def id_of(self, token: str | bytes) -> int | None:
        token = token.decode() if isinstance(token, bytes) else token
        return self.special.ids.get(token, self._vocab.get(token))

    def _to_json(self) -> dict:
        vocab = {**self.special.ids, **self._vocab}
        return {
            **self._json_parts(),
            "post_processor": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": self.unknown},
        }

    def _json_parts(self) -> dict:
        raise NotImplementedError


class CharTokenizer(_Vocabulary):
    """Character tokenizer."""

    kind = "char"

    @classmethod
    def train(cls, corpus: Corpus, special_tokens: Iterable[str] = (UNK, "<|endoftext|>")) -> "CharTokenizer":
        """Collect the characters of a corpus in code point order, after the special tokens."""
        specials = list(dict.fromkeys([*special_tokens, UNK]))
        characters: set[str] = set()
        for block in _blocks(corpus, specials, lambda text, limit: limit):
            for stretch in finder(frozenset(specials)).split(block):
                characters.update(stretch)
        first = len(specials)
        vocab = {character: first + i for i, character in enumerate(sorted(characters))}
        return cls(vocab, {token: i for i, token in enumerate(specials)})

    def _encode_stretch(self, text: str) -> list[int]:
        text.encode()  # a lone surrogate is an error here, as in every tokenizer
        get, unknown = self._vocab.get, self.unknown_id
        return [get(character, unknown) for character in text]

    def _spans(self, text: str, ids: list[int]) -> Iterable[Span]:
        return ((i, i + 1) for i in range(len(text)))

    def _safe_cut(self, text: str, limit: int) -> int:
        return limit

    def _json_parts(self) -> dict:
        return {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "decoder": {"type": "Fuse"},
        }


class WordTokenizer(_Vocabulary):
    """Word tokenizer: one id a word or punctuation mark; decoding joins them by single spaces."""

    kind = "word"

    def __init__(self, *args, lowercase: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lowercase = lowercase

    @classmethod
    def train(
        cls,
        corpus: Corpus,
        vocab_size: int,
        min_frequency: int = 1,
        lowercase: bool = True,
        special_tokens: Iterable[str] = (PAD, UNK, BOS, EOS),
    ) -> "WordTokenizer":
        """Keep the most frequent words of a corpus (ties in code point order), after the special tokens."""
        specials = list(dict.fromkeys([*special_tokens, UNK]))
        if vocab_size <= len(specials):
            raise InputError(f"vocab_size is {vocab_size}; it must exceed the {len(specials)} special tokens")
        counts: Counter[str] = Counter()
        for block in _blocks(corpus, specials, _cut_at_space):
            for stretch in finder(frozenset(specials)).split(block):
                counts.update(_words(stretch, lowercase))
        kept = sorted(
            (item for item in counts.items() if item[1] >= min_frequency), key=lambda item: (-item[1], item[0])
        )
        words = [word for word, _ in kept[: vocab_size - len(specials)]]
        vocab = {word: len(specials) + i for i, word in enumerate(words)}
        return cls(vocab, {token: i for i, token in enumerate(specials)}, lowercase=lowercase)

    def _encode_stretch(self, text: str) -> list[int]:
        text.encode()
        get, unknown = self._vocab.get, self.unknown_id
        return [get(word, unknown) for word in _words(text, self.lowercase)]

    def _spans(self, text: str, ids: list[int]) -> Iterable[Span]:
        return (match.span() for match in _WORD.finditer(text))

    def _safe_cut(self, text: str, limit: int) -> int:
        return _cut_at_space(text, limit)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to words joined by spaces."""
        return b" ".join(map(self.token_bytes, id_array(ids, self._bad_id).tolist()))

    def stream(self, continues: bool = False) -> StreamDecoder:
        """Streaming decoder."""
        return _SpacedStream(self)

    def _json_parts(self) -> dict:
        return {
            "normalizer": {"type": "Lowercase"} if self.lowercase else None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": _WORD_PATTERN},
                "behavior": "Removed",
                "invert": True,
            },
            "decoder": None,
        }


class _SpacedStream(StreamDecoder):
    """Streaming decoder of words."""

    def __init__(self, tokenizer: WordTokenizer) -> None:
        super().__init__(tokenizer.token_bytes)
        self._separator = ""

    def push(self, token_id: int) -> str:
        text = self._separator + super().push(token_id)
        self._separator = " "
        return text

    def finish(self) -> str:
        self._separator = ""
        return super().finish()


def _words(text: str, lowercase: bool) -> list[str]:
    words = _WORD.findall(text)
    return [_lower(word) for word in words] if lowercase else words


def _lower(word: str) -> str:
    """Context-free lowercase: a final Greek sigma stays σ, so that cutting text changes nothing."""
    return "".join(map(str.lower, word)) if "Σ" in word else word.lower()


def _cut_at_space(text: str, limit: int) -> int:
    match = _LAST_SPACE.search(text, 0, min(limit, len(text)))
    return match.end() if match else 0


def _blocks(corpus: Corpus, specials: list[str], cut) -> Iterable[str]:
    special = SpecialTokens({token: number for number, token in enumerate(specials)})
    for document in documents(corpus):
        pieces = read_pieces(document) if isinstance(document, Path) else [document]
        for block, _ in cut_stream(pieces, special, specials, cut, 1 << 20):
            yield block


def is_char_split(pattern: str) -> bool:
    """Return whether a tokenizer.json's regular expression matches exactly one character, whatever it is."""
    return pattern in (r"[\s\S]", r"(?s:.)", r"(?s).", r"[\S\s]")


def is_word_split(pattern: str) -> bool:
    """Return whether a tokenizer.json's regular expression is `WordTokenizer`'s."""
    return re.sub(r"\s", "", pattern) == _WORD_PATTERN
