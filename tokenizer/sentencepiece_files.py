"""SentencePiece vocabularies (BPE with scores): `tokenizer.model`, GGUF metadata.

Such a vocabulary has no merges but scores: of two neighbors that together are a piece, those with the best are joined
first. Every way to cut a piece into two pieces is therefore a merge, in the order of the scores.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .bpe import BPETokenizer
from .errors import InputError
from .metaspace import SPACE, Metaspace, pattern_for, spell_piece
from .specials import SpecialTokens

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of pieces, here and in GGUF
_NEVER_JOINED = -1e9  # score of a piece that no two others make
_BPE = 2  # model_type of the trainer
_IDENTITY = ("", "identity")  # names of normalizers that change nothing


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def from_pieces(pieces: Iterable[Piece], prefix: bool) -> BPETokenizer:
    """Build a tokenizer from SentencePiece pieces, whose positions are the ids.

    prefix: put a space before a text.
    """
    vocab: dict[bytes, int] = {}
    scores: dict[bytes, float] = {}
    byte_tokens: dict[int, int] = {}
    added: dict[str, int] = {}
    plain: set[str] = set()
    for token_id, piece in enumerate(pieces):
        if piece.kind == BYTE:
            byte_tokens[_byte_of(piece.text)] = token_id
        elif piece.kind in (UNKNOWN, CONTROL, USER):
            added[piece.text] = token_id
            plain |= {piece.text} if piece.kind == USER else set()
        elif piece.kind == NORMAL:
            token = piece.text.replace(SPACE, " ").encode()
            vocab[token], scores[token] = token_id, piece.score
    special = SpecialTokens(added)
    special.plain = frozenset(plain)
    cuts = (
        (-scores[token], vocab[token], vocab[token[:i]], vocab[token[i:]], token[:i], token[i:])
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    )
    merges = [(left, right) for *_, left, right in sorted(cuts)]
    metaspace = Metaspace(byte_tokens, "always" if prefix else "never", strip="space" if prefix else "never")
    return BPETokenizer(vocab, merges, special, pattern_for(merges, whole_words=False), metaspace=metaspace)


def to_pieces(tokenizer: BPETokenizer) -> dict[int, Piece]:
    """SentencePiece pieces of a tokenizer by id; the inverse of `from_pieces`.

    Scores say which piece comes first, so each piece must be made by all of its cuts, one after the other.
    """
    vocab, metaspace = tokenizer.vocab, tokenizer.metaspace
    assert metaspace is not None
    if metaspace.replaces or metaspace.if_missing or metaspace.prefix == "first":
        raise InputError("the tokenizer's normalizer has no SentencePiece form: only a space before every text has")
    made = [left + right for left, right in tokenizer.merges]
    order = [token for token, before in zip(made, [None, *made]) if token != before]
    cuts = sum(token[:i] in vocab and token[i:] in vocab for token in vocab for i in range(1, len(token)))
    if len(set(order)) != len(order) or cuts != len(made):
        raise InputError("the tokenizer's merges have no SentencePiece form: they are not all cuts of pieces, by score")
    scores = {token: -float(rank) for rank, token in enumerate(order)}
    pieces = {token_id: Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte, token_id in metaspace.byte_tokens.items()}
    for token, token_id in vocab.items():
        pieces[token_id] = Piece(spell_piece(token), scores.get(token, _NEVER_JOINED), NORMAL)
    for token, token_id in tokenizer.special_tokens.items():
        kind = USER if token in tokenizer.special.plain else UNKNOWN if token == "<unk>" else CONTROL
        pieces[token_id] = Piece(token, 0.0, kind)
    return pieces


def read_sentencepiece(path: Path) -> BPETokenizer:
    """Load a `tokenizer.model`."""
    try:
        return _read(path.read_bytes())
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from None
        raise InputError(f"{path} is not a complete SentencePiece model: {type(error).__name__} {error}") from None


def _read(data: bytes) -> BPETokenizer:
    pieces: list[Piece] = []
    trainer: dict = {}
    normalizer: dict = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append(Piece(piece[1].decode(), piece.get(2, 0.0), piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise InputError("it holds no SentencePiece vocabulary (no pieces)")
    if trainer.get(3, 1) != _BPE:
        raise InputError(f"trainer_spec.model_type is {trainer.get(3, 1)}; only {_BPE}, BPE, is implemented")
    rules = normalizer.get(1, b"").decode()
    if rules not in _IDENTITY and normalizer.get(2):
        raise InputError(f"normalizer_spec.name is {rules!r}; only identity is implemented")
    if normalizer.get(4, 1):
        raise InputError("normalizer_spec.remove_extra_whitespaces is true, which is not implemented")
    tokenizer = from_pieces(pieces, bool(normalizer.get(3, 1)))
    for role, number, usual in (("bos", 41, 1), ("eos", 42, 2)):
        setattr(tokenizer.special, role, tokenizer.special.texts.get(trainer.get(number, usual)))
    if tokenizer.special.bos:  # such a file has no post-processor to say so; whoever reads it puts one
        tokenizer.prefix_ids = [tokenizer.special.ids[tokenizer.special.bos]]
    return tokenizer


def _byte_of(text: str) -> int:
    if len(text) != 6 or not text.startswith("<0x"):
        raise InputError(f"piece {text!r} is of the kind byte, but not spelled like <0x0A>")
    return int(text[3:5], 16)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message: number, and int, float or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise InputError(f"byte {at} begins no field of a protocol buffer")
        size = {1: 8, 5: 4}.get(kind) or varint()
        if size > len(data) - at:
            raise InputError(f"the field at byte {at} wants {size} bytes, but only {len(data) - at} are left")
        value = data[at : at + size]
        at += size
        yield key >> 3, struct.unpack("<f", value)[0] if kind == 5 else value
