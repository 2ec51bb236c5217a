"""Byte-pair encoding (BPE), byte-level or SentencePiece.

Byte-level vocabularies (GPT-2 and most since) start from bytes, SentencePiece's (Llama 2, Mistral, Gemma) from
characters, which is nearly the same: metaspace.py.

This file is the public API. The work is done by one of two engines that give identical results: the C++ extension
(csrc/), or the pure-Python reference.py, selected by `WARPLOOM_NATIVE=0` and used where the extension was not built.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import native, rank_files
from .base import Allowed, Tokenizer, default_threads, id_array
from .byte_alphabet import to_text
from .errors import InputError
from .metaspace import SPACE, Metaspace, bytes_of, spell_piece
from .patterns import FORMS, Form, Pattern, compile_pattern, compose, composed_with, pattern_name, safe_cut
from .pipeline import BPE_FLAGS, stages_of
from .reference import Merges, Progress, PythonBPE, count_words, tie_key, train_merges
from .sources import Corpus, atomic_writer, write_text
from .specials import Follows, SpecialTokens, finder
from .stream import StreamDecoder

END_OF_TEXT = "<|endoftext|>"


class BPETokenizer(Tokenizer):
    """Byte-pair-encoding tokenizer.

    vocab: the id of each token. Bytes that are none are dropped from text before merging, as published vocabularies
        that lack some (Pythia, SmolLM2) want it.
    merges: pairs of tokens in the order in which they were learned.
    special_tokens: markers outside the text, with their ids.
    pattern: how text is cut before merging; a name from `PATTERNS`, a regular expression, or several, each of which
        cuts the pieces of the one before.
    whole_words: look a piece up in the vocabulary before merging it (Llama 3's `ignore_merges`).
    normalizer: a Unicode normalization form applied to text first (Qwen's NFC), or None.
    metaspace: what makes it a SentencePiece vocabulary; None for a byte-level one.
    """

    def __init__(
        self,
        vocab: dict[bytes, int],
        merges: Merges,
        special_tokens: dict[str, int] | SpecialTokens | None = None,
        pattern: Pattern = "gpt4",
        *,
        whole_words: bool = False,
        normalizer: str | None = None,
        metaspace: Metaspace | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(special_tokens, chat_template)
        pattern = pattern if isinstance(pattern, str) else tuple(pattern)
        compile_pattern(pattern)
        self.metaspace = metaspace
        _check_vocabulary(vocab, merges, self.special.ids, metaspace)
        self.normalizer: Form | None = next((form for form in FORMS if form == normalizer), None)
        if normalizer is not None and self.normalizer is None:
            raise InputError(f"normalizer is {normalizer!r}; it must be None or one of {', '.join(FORMS)}")
        self._vocab, self._merges = dict(vocab), [(left, right) for left, right in merges]
        bytes_alone = metaspace.byte_tokens if metaspace else {}
        self._tokens = {token_id: bytes([byte]) for byte, token_id in bytes_alone.items()}
        self._tokens |= {token_id: token for token, token_id in vocab.items()}
        self.pattern, self.whole_words = pattern, whole_words
        self._build_engine()

    def _build_engine(self) -> None:
        """Build the native encoder and decoder; added tokens decide how wide ids are as well."""
        self._native: Any = native.extension()
        self._engine: Any
        self._scans = bool(self._native and pattern_name(self.pattern))  # text can go straight to C++
        self._finders: dict[str | frozenset[str], Any] = {}
        self._decoder: Any = None
        parts = (self._vocab, self._merges, self.pattern, self.whole_words)
        if self._native:
            self._engine = native.build_encoder(self._native, *parts, self.metaspace, wide=self.dtype.itemsize == 4)
        else:
            self._engine = PythonBPE(*parts, self.metaspace and self.metaspace.byte_tokens)
        late = self.special.normalized if self.metaspace else ()  # they look otherwise once text is normalized
        self._late = frozenset(map(self._normalize, late))
        early = self.special.ids.keys() - self.special.normalized
        composes = self.normalizer == "NFC" and not self.metaspace and all(map(str.isascii, early))
        self._unsafe = composed_with(early) if composes else None
        changes = self.normalizer or self._late or (self.metaspace and self.metaspace.replaces)
        self._is_verbatim = self._scans and not changes
        bare = self._is_verbatim and not self.special.plain
        self._encode_bare: Any = self._engine.bare_encode() if bare else None

    def __getstate__(self) -> dict:
        """State without the engine, for copying and pickling."""
        rebuilt = ("_native", "_engine", "_encode_bare", "_finders", "_decoder")
        return {name: value for name, value in self.__dict__.items() if name not in rebuilt}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._build_engine()

    @classmethod
    def train(
        cls,
        corpus: Corpus,
        vocab_size: int,
        pattern: Pattern = "gpt4",
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        threads: int | None = None,
        *,
        ties: str = "bytes",
        min_frequency: int = 1,
        max_token_length: int | None = None,
        progress: Progress | None = None,
        reading: Progress | None = None,
    ) -> "BPETokenizer":
        """Train a vocabulary: 256 bytes, then merges, then special tokens, `vocab_size` in all.

        corpus: a path, a list of paths, or an iterable of texts; read as a stream, so its size is no limit.
        special_tokens: never merged across; where they stand in the corpus they separate documents.
        ties: among equally frequent pairs, "bytes" takes the lexicographically greatest (the classic course rule),
            "hf" and "ids" the smallest ids as Hugging Face's and Karpathy's trainers number them.
        min_frequency: pairs rarer than this are not merged.
        max_token_length: no token gets more bytes than this.
        progress: called with (merges so far, merges wanted).
        reading: before that, called with (bytes read, bytes of all files; 0 for texts).
        """
        specials = list(dict.fromkeys(special_tokens))
        num_merges = vocab_size - 256 - len(specials)
        if num_merges < 0:
            raise InputError(
                f"vocab_size is {vocab_size}; 256 bytes and {len(specials)} special tokens need at least "
                f"{256 + len(specials)}"
            )
        if min_frequency < 1:
            raise InputError(f"min_frequency is {min_frequency}; it must be at least 1")
        if max_token_length is not None and max_token_length < 1:
            raise InputError(f"max_token_length is {max_token_length}; it must be at least 1, or None")
        tie_key(ties)
        compile_pattern(pattern)
        rules = (num_merges, ties, min_frequency, max_token_length, progress)
        if module := native.extension():
            merges = native.train_merges(module, corpus, pattern, specials, default_threads(threads), *rules, reading)
        else:
            merges = train_merges(count_words(corpus, pattern, specials, reading), *rules)
        vocab = {bytes([byte]): byte for byte in range(256)}
        for token_id, (left, right) in enumerate(merges, 256):
            vocab[left + right] = token_id
        ids = {token: 256 + len(merges) + i for i, token in enumerate(specials)}
        return cls(vocab, merges, ids, pattern)

    @classmethod
    def from_tiktoken(
        cls, path: str | Path, pattern: Pattern = "gpt4", special_tokens: dict[str, int] | None = None
    ) -> "BPETokenizer":
        """Load a tiktoken rank file: lines of a base64 token and its rank."""
        vocab = rank_files.read_tiktoken(path)
        merges, whole_words = rank_files.merges_of_ranks(vocab)
        return cls(vocab, merges, special_tokens, pattern, whole_words=whole_words)

    def to_tiktoken(self, path: str | Path) -> None:
        """Write a tiktoken rank file (special tokens and pattern are not part of the format)."""
        write_text(path, rank_files.tiktoken_lines(self._vocab, self._merges))

    @classmethod
    def from_gpt2_files(
        cls,
        vocab_json: str | Path,
        merges_txt: str | Path,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        pattern: Pattern = "gpt2",
    ) -> "BPETokenizer":
        """Load GPT-2's `vocab.json` and `merges.txt`."""
        vocab, merges, specials = rank_files.read_gpt2_files(vocab_json, merges_txt, special_tokens)
        return cls(vocab, merges, specials, pattern)

    # -- what is in the vocabulary ----------------------------------------------------------------------------------

    @property
    def vocab(self) -> dict[bytes, int]:
        """Ordinary tokens (as bytes) and their ids."""
        return self._vocab

    @property
    def merges(self) -> Merges:
        """Merges, in the order learned."""
        return self._merges

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokens.get(token_id)
        if token is not None:
            return token
        special = self.special.texts.get(token_id)
        if special is None:
            raise self._bad_id(token_id)
        return self._added_bytes(special)

    def _added_bytes(self, token: str) -> bytes:
        return (token.replace(SPACE, " ") if self.metaspace else token).encode()

    def id_of(self, token: str | bytes) -> int | None:
        if isinstance(token, str):
            if token in self.special.ids:
                return self.special.ids[token]
            token = token.encode()
        return self._vocab.get(token)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows of an embedding."""
        if self._vocab_size is None:
            self._vocab_size = 1 + max(*self._tokens, *self.special.texts, -1)
        return self._vocab_size

    def _set_special_tokens(self, ids: dict[str, int]) -> None:
        _check_vocabulary(self._vocab, [], ids, self.metaspace)
        super()._set_special_tokens(ids)
        self._build_engine()

    # -- text to ids ------------------------------------------------------------------------------------------------

    def _encode_stretch(self, text: str) -> list[int]:
        return self._stretch_ids(text, None).tolist()

    def _stretch_ids(self, text: str, threads: int | None) -> np.ndarray:
        """Ids of a stretch of ordinary text, without added tokens in it."""
        if self._scans:
            return self._engine.encode_array(text, None, default_threads(threads), self._native.Follows.text)
        if self._native:
            return self._engine.encode_pieces(text, native.byte_ends(text, self.pattern))
        return np.array(self._engine.encode(text), self.dtype)

    def _normalize(self, text: str) -> str:
        text = unicodedata.normalize(self.normalizer, text) if self.normalizer else text
        return self.metaspace.normalize(text) if self.metaspace else text

    def _direct(self, text: str) -> str | None:
        """Text that the native encoder can take as a whole, added tokens included; None if it cannot."""
        if self._is_verbatim:
            return text
        if not self._scans:
            return None
        if self.normalizer and not text.isascii():
            if self._unsafe:
                return compose(text, self._unsafe)
            if not unicodedata.is_normalized(self.normalizer, text):
                return None
        if self.metaspace is None:
            return text
        late = finder(self._late).finditer(text.replace(SPACE, " ")) if self._late else ()
        return None if any(old in text for old, _ in self.metaspace.replaces) or any(late) else text

    def _direct_all(self, texts: Sequence[str]) -> list[str] | None:
        """`_direct` of each text, or None if it fails for one."""
        direct = [part for text in texts if (part := self._direct(text)) is not None]
        return direct if len(direct) == len(texts) else None

    def _finder(self, allowed_special: Allowed) -> object | None:
        """Native finder of the added tokens that text may contain."""
        key = allowed_special if isinstance(allowed_special, str) else frozenset(allowed_special)
        if key not in self._finders:
            special = self.special
            normalized = special.normalized if self.normalizer and not self.metaspace else ()
            tokens = [
                (
                    (self._normalize(token) if token in normalized else token).encode(),
                    token_id,
                    token in special.lstrip,
                    token in special.rstrip,
                )
                for token, token_id in special.allowed(key).items()
            ]
            self._finders[key] = self._native.Specials(tokens) if tokens else None
        return self._finders[key]

    def encode(self, text: str, allowed_special: Allowed = "none") -> list[int]:
        if self._encode_bare and allowed_special == "none":
            return self._encode_bare(text)
        if (direct := self._direct(text)) is not None:
            return self._engine.encode(direct, self._finder(allowed_special))
        return self.encode_part(text, "start", allowed_special).tolist()

    def encode_array(self, text: str, allowed_special: Allowed = "none", threads: int | None = None) -> np.ndarray:
        return self.encode_part(text, "start", allowed_special, threads)

    def encode_part(
        self, text: str, follows: Follows, allowed_special: Allowed = "none", threads: int | None = None
    ) -> np.ndarray:
        """Tokenize a part of a text that follows its start, an added token or other text; see `cut_stream`."""
        if (direct := self._direct(text)) is not None:
            place = getattr(self._native.Follows, follows)
            return self._engine.encode_array(direct, self._finder(allowed_special), default_threads(threads), place)
        pieces = [
            self._stretch_ids(piece, threads) if added_id is None else np.array([added_id], self.dtype)
            for piece, added_id, _ in self._stretches(text, allowed_special, follows)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _stretches(
        self, text: str, allowed_special: Allowed, follows: Follows = "start"
    ) -> Iterator[tuple[str, int | None, int]]:
        """Normalize and split a text at added tokens: (stretch, None or the added token's id, position).

        Positions are in the normalized text, without a space put in front. Tokens are matched before normalization;
        those of `special.normalized`, after it.
        """
        text.encode()  # a lone surrogate is an error
        allowed = self.special.allowed(allowed_special)
        late: dict[str, int] = {}
        if self.normalizer or self.metaspace:
            late = {token: allowed[token] for token in self.special.normalized & allowed.keys()}
        early = {token: token_id for token, token_id in allowed.items() if token not in late}
        start = 0
        for piece, added_id in self.special.split(text, early):
            if added_id is not None:
                yield piece, added_id, start
                start, follows = start + len(piece), "added"
                continue
            for stretch, added_id, place in self._normalized_stretches(piece, late, follows):
                yield stretch, added_id, start + place
                follows = "text" if added_id is None else "added"
            start += len(self._normalize(piece))

    def _normalized_stretches(
        self, text: str, late: dict[str, int], follows: Follows
    ) -> Iterator[tuple[str, int | None, int]]:
        """The same for text with only those added tokens that are matched after normalization."""
        text, metaspace, start = self._normalize(text), self.metaspace, 0
        # A space that the normalizer puts in front belongs to a token behind it; the pre-tokenizer puts it there later.
        prepends = metaspace is not None and metaspace.prefix == "always" and not metaspace.if_missing
        sought = {" " * prepends + self._normalize(token): token_id for token, token_id in late.items()}
        if metaspace and prepends and metaspace.puts_space(text, follows):
            text, start, follows = " " + text, -1, "text"
        for piece, added_id in self.special.split(text, sought):
            begin, start = start, start + len(piece)
            if added_id is None and metaspace and not prepends and metaspace.puts_space(piece, follows):
                piece, begin = " " + piece, begin - 1
            yield piece, added_id, begin
            follows = "text" if added_id is None else "added"

    def encode_batch(
        self, texts: Sequence[str], allowed_special: Allowed = "none", threads: int | None = None
    ) -> list[list[int]]:
        if (direct := self._direct_all(texts)) is None:
            return super().encode_batch(texts, allowed_special, threads)
        return self._engine.encode_batch(direct, self._finder(allowed_special), default_threads(threads))

    def encode_batch_array(
        self, texts: Sequence[str], allowed_special: Allowed = "none", threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if (direct := self._direct_all(texts)) is None:
            return super().encode_batch_array(texts, allowed_special, threads)
        return self._engine.encode_batch_array(direct, self._finder(allowed_special), default_threads(threads))

    def encode_file(
        self,
        path: str | Path,
        out: str | Path,
        threads: int | None = None,
        allowed_special: Allowed = "none",
        progress: Progress | None = None,
    ) -> int:
        if not self._scans or self._late:
            return super().encode_file(path, out, threads, allowed_special, progress)
        tokens, threads = self._finder(allowed_special), default_threads(threads)
        total, done, size = 0, 0, Path(path).stat().st_size
        with atomic_writer(out) as file:
            for block, follows in native.file_blocks(self._native, path, tokens, self.pattern, threads):
                if self._is_verbatim:
                    ids = self._engine.encode_array(block, tokens, threads, follows)
                else:
                    ids = self.encode_part(str(block, "utf-8"), follows.name, allowed_special, threads)
                file.write(ids.astype(self.dtype.newbyteorder("<"), copy=False).data)
                total, done = total + len(ids), done + len(block)
                if progress:
                    progress(done, size)
        return total

    def count(self, text: str, allowed_special: Allowed = "none") -> int:
        if (direct := self._direct(text)) is None:
            return super().count(text, allowed_special)
        return self._engine.count(direct, self._finder(allowed_special), default_threads(None))

    def _safe_cut(self, text: str, limit: int) -> int:
        return 0 if any(" " in token for token in self._late) else safe_cut(text, limit, self.pattern)

    def _cut_behind(self, allowed_special: Allowed) -> dict[str, int]:
        late = self.special.normalized if self._late else ()
        allowed = self.special.allowed(allowed_special)
        return {token: token_id for token, token_id in allowed.items() if token not in late}

    # -- ids to text ------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes."""
        if not self._native:
            return super().decode_bytes(ids)
        if self._decoder is None:
            added = {token_id: self._added_bytes(token) for token_id, token in self.special.texts.items()}
            self._decoder = native.build_decoder(self._native, added | self._tokens)
        return self._decoder.decode(id_array(ids, self._bad_id))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD, or as `errors` says (see `bytes.decode`).

        A space that SentencePiece puts in front of a text is taken away again.
        """
        ids = id_array(ids, self._bad_id)
        if self.metaspace is None or not len(ids):
            return super().decode(ids, errors)
        opening = self.metaspace.opening(self.token_bytes(int(ids[0])))
        return (opening + self.decode_bytes(ids[1:])).decode("utf-8", errors)

    def stream(self, continues: bool = False) -> StreamDecoder:
        """Streaming decoder: takes ids one by one and never returns half a character.

        continues: the ids go on a text, so that a space in front of them is kept.
        """
        opening = self.metaspace.opening if self.metaspace and not continues else None
        return StreamDecoder(self.token_bytes, opening=opening)

    def _spans(self, text: str, ids: list[int]) -> Iterable[tuple[int, int]]:
        lengths = np.array([len(self._tokens[i]) for i in ids], dtype=np.int64)
        ends = np.cumsum(lengths)
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1
        known = np.array([token_id is not None for token_id in bytes_of(self._vocab, self.metaspace)])
        character = character[known[data]]  # the other bytes are dropped
        return zip(character[ends - lengths].tolist(), (character[ends - 1] + 1).tolist())

    # -- keeping ----------------------------------------------------------------------------------------------------

    def _to_json(self) -> dict:
        stages = dict(self.loaded) if self.loaded else stages_of(self.pattern, self.normalizer, self.metaspace)
        listed = stages.pop("vocab", {})  # added tokens that the model's own vocabulary holds too
        flags = {"ignore_merges": self.whole_words, "byte_fallback": self.metaspace is not None}
        flags |= stages.pop("model", {})
        spell, alone = (spell_piece, self.metaspace.byte_tokens) if self.metaspace else (to_text, {})
        vocab = {f"<0x{byte:02X}>": token_id for byte, token_id in alone.items()} | listed
        vocab |= {spell(token): token_id for token, token_id in self._vocab.items()}
        merges = [[spell(left), spell(right)] for left, right in self._merges]
        return {**stages, "model": {**BPE_FLAGS, **flags, "vocab": vocab, "merges": merges}}


def _check_vocabulary(
    vocab: dict[bytes, int], merges: Merges, specials: dict[str, int], metaspace: Metaspace | None
) -> None:
    ids = set(vocab.values())
    if not ids:
        raise InputError("vocab is empty; it must hold at least one token")
    if len(ids) != len(vocab):
        raise InputError("vocab gives one id to several tokens; each token needs an id of its own")
    if min(ids) < 0 or max(ids) >= 1 << 28:
        raise InputError(f"vocab has ids from {min(ids)} to {max(ids)}; ids go from 0 to {(1 << 28) - 1}")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise InputError(f"merges holds ({left!r}, {right!r}), but vocab lacks {token!r}")
        if not left or not right:
            raise InputError(f"merges holds ({left!r}, {right!r}); both halves need at least one byte")
    if metaspace and (missing := [byte for byte, token in enumerate(bytes_of(vocab, metaspace)) if token is None]):
        raise InputError(f"vocab lacks a token for the byte 0x{missing[0]:02x}; unknown tokens are not implemented")
    for token, token_id in specials.items():
        spelled = token.replace(SPACE, " ") if metaspace else token
        if token_id in ids and vocab.get(spelled.encode()) != token_id:
            raise InputError(f"special token {token!r} has id {token_id}, which vocab gives to another token")
