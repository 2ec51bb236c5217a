"""What every tokenizer can do, written once over two primitives.

A kind of tokenizer (BPE, characters, words) says how ordinary text becomes ids (`_encode_ordinary`) and which bytes an
id stands for (`token_bytes`). Everything else here follows from that: special tokens, arrays, batches, streams, files.
`BPETokenizer` overrides the calls where native code is faster; the meaning stays.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .chat import ChatTemplate
from .sources import atomic_writer, read_pieces
from .specials import SpecialTokens, cut_stream
from .stream import StreamDecoder

Allowed = Literal["none", "all"] | Iterable[str]


class Tokenizer(ABC):
    """Text to token ids and back."""

    def __init__(self, special_tokens: dict[str, int] | None = None, chat_template: str | None = None) -> None:
        self.special = SpecialTokens(special_tokens or {})
        self.chat_template = chat_template

    # -- what a kind of tokenizer defines ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def vocab(self) -> dict:
        """Ordinary tokens and their ids; special tokens are in `special_tokens`."""

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which no special token is recognized."""

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
        """The last position up to `limit` where cutting the text changes no id; 0 if there is none."""

    # -- what is in the vocabulary ----------------------------------------------------------------------------------

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        return dict(self.special.ids)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id: the number of rows an embedding needs."""
        return 1 + max(max(self.vocab.values(), default=-1), max(self.special.ids.values(), default=-1))

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id; what `encode_array` returns."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, or None if the vocabulary has no such token."""
        return self.special.end_of_text()

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document, or None if the vocabulary has no such token."""
        return self.special.begin_of_text()

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a generation: `eos_id`, what config files add to it, and ends of a turn."""
        return self.special.stop_ids()

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that the loaded post-processor puts before every text (Llama's <s>); `encode` does not."""
        from .files import prefix_of

        return prefix_of(getattr(self, "json_extras", {}).get("post_processor"))

    def add_special_tokens(self, tokens: Iterable[str]) -> list[int]:
        """Add special tokens after the last id and return their ids; one that exists keeps its id."""
        ids = dict(self.special.ids)
        size = self.vocab_size
        for token in tokens:
            if token not in ids:
                ids[token] = size
                size += 1
        self._set_special_tokens(ids)
        return [ids[token] for token in tokens]

    def _set_special_tokens(self, ids: dict[str, int]) -> None:
        kept = self.special
        self.special = SpecialTokens(ids)
        self.special.plain, self.special.stops = kept.plain, kept.stops
        self.special.bos, self.special.eos = kept.bos or self.special.bos, kept.eos or self.special.eos

    # -- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str, allowed_special: Allowed = "none") -> list[int]:
        """Token ids of `text`. Special tokens are recognized only when `allowed_special` names them (or is "all")."""
        allowed = self.special.allowed(allowed_special)
        if not allowed:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for piece, special_id in self.special.split(text, allowed):
            if special_id is None:
                ids += self._encode_ordinary(piece)
            else:
                ids.append(special_id)
        return ids

    def encode_array(self, text: str, allowed_special: Allowed = "none", threads: int | None = None) -> np.ndarray:
        """Token ids as a NumPy array of `dtype`."""
        return np.array(self.encode(text, allowed_special), dtype=self.dtype)

    def encode_batch(
        self, texts: Sequence[str], allowed_special: Allowed = "none", threads: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text."""
        return [self.encode(text, allowed_special) for text in texts]

    def encode_batch_array(
        self, texts: Sequence[str], allowed_special: Allowed = "none", threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All ids in one array and the n + 1 offsets (int64) where each text begins and the last one ends."""
        arrays = [self.encode_array(text, allowed_special) for text in texts]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        return np.concatenate(arrays) if arrays else np.empty(0, self.dtype), offsets

    def encode_iterable(self, pieces: Iterable[str], allowed_special: Allowed = "none") -> Iterator[int]:
        """Ids of the pieces' concatenation, one at a time, in constant memory wherever the text can be cut."""
        for text in cut_stream(pieces, self.special.allowed(allowed_special), self._safe_cut, 1 << 16):
            yield from self.encode_array(text, allowed_special).tolist()

    def encode_file(
        self,
        path: str | Path,
        out: str | Path,
        threads: int | None = None,
        allowed_special: Allowed = "none",
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode a UTF-8 text file into a flat file of little-endian ids of `dtype`; returns how many there are.

        `progress` is called with (bytes read, bytes of the file)."""
        allowed = self.special.allowed(allowed_special)
        total, done, size = 0, 0, Path(path).stat().st_size
        with atomic_writer(out) as file:
            for text in cut_stream(read_pieces(path), allowed, self._safe_cut, 1 << 20):
                ids = self.encode_array(text, allowed_special, threads)
                file.write(ids.astype(self.dtype.newbyteorder("<"), copy=False).data)
                total += len(ids)
                if progress:
                    done += len(text.encode())
                    progress(done, size)
        return total

    def count(self, text: str, allowed_special: Allowed = "none") -> int:
        """How many ids `encode` would give."""
        return len(self.encode_array(text, allowed_special))

    def encode_with_offsets(
        self, text: str, allowed_special: Allowed = "none"
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the span of characters it touches; tokens may share a character."""
        ids = self.encode(text, allowed_special)
        lengths = np.array([len(self.token_bytes(i)) for i in ids], dtype=np.int64)
        ends = np.cumsum(lengths)
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1
        return ids, list(zip(character[ends - lengths].tolist(), (character[ends - 1] + 1).tolist()))

    # -- ids to text ------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, joined."""
        return b"".join(map(self.token_bytes, id_array(ids, self._bad_id).tolist()))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, or as `errors` says (see `bytes.decode`)."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def stream(self) -> StreamDecoder:
        """A decoder that takes ids one by one and never returns half a character."""
        return StreamDecoder(self.token_bytes)

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers` and `tokenizers` open too."""
        from .files import save_tokenizer

        save_tokenizer(self, directory)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The prompt a conversation becomes, by the tokenizer's own Jinja template."""
        names = self.special.roles()
        return ChatTemplate(self.chat_template).render(messages, add_generation_prompt, **{**names, **variables})

    def _bad_id(self, token_id: object) -> ValueError:
        return ValueError(f"token id {token_id} is not in this vocabulary, whose ids are 0 to {self.vocab_size - 1}")

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, special_tokens={len(self.special.ids)})"


def default_threads(threads: int | None) -> int:
    """The number of threads to use: what was asked for, or as many as this process may run on."""
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1, or None for every core")
    return threads


def id_array(ids: Iterable[int], bad_id: Callable[[object], ValueError]) -> np.ndarray:
    """Ids in whatever form as a flat array of whole numbers."""
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
        raise ValueError(f"ids must be a flat sequence of whole numbers, not {ids.ndim} dimensions of {ids.dtype}")
    return ids
