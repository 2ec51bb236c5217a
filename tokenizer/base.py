"""Tokenizer base class: everything derived from two primitives, `_encode_stretch` and `token_bytes`.

A kind of tokenizer (BPE, characters, words) says how ordinary text becomes ids (`_encode_stretch`) and which bytes an
id stands for (`token_bytes`). Everything else here follows from that: special tokens, arrays, batches, streams, files.
`BPETokenizer` overrides the calls where native code is faster; the meaning stays.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .chat import render
from .cpus import available_cpus
from .errors import InputError
from .sources import atomic_writer, read_pieces, write_text
from .specials import Follows, SpecialTokens, cut_stream
from .stream import StreamDecoder

Allowed = Literal["none", "all"] | Iterable[str]


class Tokenizer(ABC):
    """Interface of all tokenizers: text to token ids and back."""

    def __init__(
        self, special_tokens: dict[str, int] | SpecialTokens | None = None, chat_template: str | None = None
    ) -> None:
        given = special_tokens or {}
        self.special = given if isinstance(given, SpecialTokens) else SpecialTokens(given)
        self.chat_template = chat_template
        self.prefix_ids: list[int] = []  # what the loaded post-processor puts before every text; `encode` does not
        self.loaded: dict = {}  # parts of the tokenizer.json that this one was read from, kept for saving
        self.config: dict = {}  # the tokenizer_config.json beside it
        self._vocab_size: int | None = None

    # -- what a kind of tokenizer defines ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def vocab(self) -> dict:
        """Ordinary tokens and their ids; added tokens are in `special_tokens`."""

    @abstractmethod
    def _encode_stretch(self, text: str) -> list[int]:
        """Ids of a stretch of ordinary text, without added tokens in it."""

    @abstractmethod
    def _spans(self, text: str, ids: list[int]) -> Iterable[tuple[int, int]]:
        """Span of characters that each id of ordinary text covers."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes an id stands for."""

    @abstractmethod
    def id_of(self, token: str | bytes) -> int | None:
        """The id of a token, ordinary or special, or None."""

    @abstractmethod
    def _to_json(self) -> dict:
        """The content of `tokenizer.json`."""

    @abstractmethod
    def _safe_cut(self, text: str, limit: int) -> int:
        """Last position up to `limit` where cutting the text changes no id; 0 if there is none."""

    # -- what is in the vocabulary ----------------------------------------------------------------------------------

    @property
    def special_tokens(self) -> dict[str, int]:
        """Added tokens and their ids: special ones, and plain ones that are ordinary vocabulary (`special.plain`)."""
        return dict(self.special.ids)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows of an embedding."""
        if self._vocab_size is None:
            self._vocab_size = 1 + max(max(self.vocab.values(), default=-1), max(self.special.texts, default=-1))
        return self._vocab_size

    @property
    def dtype(self) -> np.dtype:
        """Smallest of uint16 and uint32 that holds every id; the dtype of `encode_array`."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-document token, or None."""
        return self.special.end_of_text()

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-document token, or None."""
        return self.special.begin_of_text()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: `eos_id`, those of config files, ends of turn."""
        return self.special.stop_ids()

    def add_special_tokens(self, tokens: Iterable[str]) -> list[int]:
        """Append special tokens and return their ids; existing ones keep theirs."""
        ids = dict(self.special.ids)
        size = self.vocab_size
        for token in tokens:
            if token not in ids:
                ids[token] = size
                size += 1
        self._set_special_tokens(ids)
        return [ids[token] for token in tokens]

    def _set_special_tokens(self, ids: dict[str, int]) -> None:
        self.special = self.special.with_ids(ids)
        self._vocab_size = None

    # -- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str, allowed_special: Allowed = "none") -> list[int]:
        """Tokenize `text`. Special tokens are recognized only if `allowed_special` names them (or is "all")."""
        ids: list[int] = []
        for piece, added_id, _ in self._stretches(text, allowed_special):
            ids += self._encode_stretch(piece) if added_id is None else [added_id]
        return ids

    def encode_part(
        self, text: str, follows: Follows, allowed_special: Allowed = "none", threads: int | None = None
    ) -> np.ndarray:
        """Tokenize a part of a text that follows its start, an added token or other text; see `cut_stream`."""
        return self.encode_array(text, allowed_special, threads)

    def _cut_behind(self, allowed_special: Allowed) -> dict[str, int]:
        """Added tokens behind which a stream may be cut."""
        return self.special.allowed(allowed_special)

    def encode_array(self, text: str, allowed_special: Allowed = "none", threads: int | None = None) -> np.ndarray:
        """Tokenize to a NumPy array of `dtype`."""
        return np.array(self.encode(text, allowed_special), dtype=self.dtype)

    def encode_batch(
        self, texts: Sequence[str], allowed_special: Allowed = "none", threads: int | None = None
    ) -> list[list[int]]:
        """Tokenize each text."""
        return [self.encode(text, allowed_special) for text in texts]

    def encode_batch_array(
        self, texts: Sequence[str], allowed_special: Allowed = "none", threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize texts into one array; return it with n + 1 offsets (int64) of the texts."""
        arrays = [self.encode_array(text, allowed_special) for text in texts]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        return np.concatenate(arrays) if arrays else np.empty(0, self.dtype), offsets

    def encode_iterable(self, pieces: Iterable[str], allowed_special: Allowed = "none") -> Iterator[int]:
        """Tokenize a stream of text pieces, yielding ids in constant memory wherever the text can be cut."""
        allowed = self._cut_behind(allowed_special)
        for text, follows in cut_stream(pieces, self.special, allowed, self._safe_cut, 1 << 16):
            yield from self.encode_part(text, follows, allowed_special).tolist()

    def encode_file(
        self,
        path: str | Path,
        out: str | Path,
        threads: int | None = None,
        allowed_special: Allowed = "none",
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Tokenize a UTF-8 file into a flat file of little-endian ids of `dtype`; return their number.

        `progress` is called with (bytes read, bytes of the file)."""
        allowed = self._cut_behind(allowed_special)
        total, done, size = 0, 0, Path(path).stat().st_size
        with atomic_writer(out) as file:
            for text, follows in cut_stream(read_pieces(path), self.special, allowed, self._safe_cut, 1 << 20):
                ids = self.encode_part(text, follows, allowed_special, threads)
                file.write(ids.astype(self.dtype.newbyteorder("<"), copy=False).data)
                total += len(ids)
                if progress:
                    done += len(text.encode())
                    progress(done, size)
        return total

    def count(self, text: str, allowed_special: Allowed = "none") -> int:
        """Number of tokens of a text."""
        return len(self.encode_array(text, allowed_special))

    def encode_with_offsets(
        self, text: str, allowed_special: Allowed = "none"
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize with offsets: ids, and the character span of each; tokens may share a character."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for piece, added_id, start in self._stretches(text, allowed_special):
            if added_id is None:
                ordinary = self._encode_stretch(piece)
                ids += ordinary
                spans += [(max(start + a, 0), start + b) for a, b in self._spans(piece, ordinary)]
            else:
                ids.append(added_id)
                spans.append((start, start + len(piece)))
        return ids, spans

    def _stretches(
        self, text: str, allowed_special: Allowed, follows: Follows = "start"
    ) -> Iterator[tuple[str, int | None, int]]:
        """Split a text at added tokens: (stretch, None or the added token's id, position)."""
        start = 0
        for piece, added_id in self.special.split(text, self.special.allowed(allowed_special)):
            yield piece, added_id, start
            start += len(piece)

    # -- ids to text ------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes."""
        return b"".join(map(self.token_bytes, id_array(ids, self._bad_id).tolist()))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD, or as `errors` says (see `bytes.decode`)."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def stream(self, continues: bool = False) -> StreamDecoder:
        """Streaming decoder: takes ids one by one and never returns half a character.

        continues: the ids go on a text, so that what `decode` takes away where one begins (a space that SentencePiece
            puts there) is kept.
        """
        return StreamDecoder(self.token_bytes)

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers` and `tokenizers` open too.

        Of a tokenizer that was loaded, every stage of the pipeline is written as it was read.
        """
        directory = Path(directory)
        data = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.special.to_json(),
            **self._to_json(),
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config, **self.special.roles()}
        config.pop("chat_template", None)
        write_text(directory / "tokenizer.json", json.dumps(data, ensure_ascii=False))
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            write_text(directory / "chat_template.jinja", self.chat_template)
        write_text(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))

    def apply_chat_template(self, messages: list[dict], /, add_generation_prompt: bool = True, **variables) -> str:
        """Render a conversation with the tokenizer's Jinja chat template."""
        variables = {**self.special.roles(), **variables, "add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, messages, variables)

    def _bad_id(self, token_id: object) -> InputError:
        return InputError(f"token id {token_id} is not in this vocabulary, whose ids are 0 to {self.vocab_size - 1}")

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, special_tokens={len(self.special.ids)})"


def default_threads(threads: int | None) -> int:
    """Number of threads: as asked for, or as many CPUs as this process may use."""
    if threads is None:
        return available_cpus()
    if threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1, or None for every core")
    return threads


def id_array(ids: Iterable[int], bad_id: Callable[[object], InputError]) -> np.ndarray:
    """Ids in any form as a flat integer array."""
    if not isinstance(ids, np.ndarray):
        ids = list(ids)
        try:
            array = np.array(ids) if ids else np.empty(0, np.int64)
        except (OverflowError, ValueError):
            array = np.array(ids, dtype=object)
        if array.dtype.kind not in "iu":
            raise bad_id(next((i for i in ids if not isinstance(i, (int, np.integer)) or abs(i) >= 1 << 63), ids))
        ids = array
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(f"ids must be a flat sequence of whole numbers, not {ids.ndim} dimensions of {ids.dtype}")
    return ids
