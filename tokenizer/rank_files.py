"""Older vocabulary formats: tiktoken rank files, GPT-2's `vocab.json` and `merges.txt`."""

import base64
import binascii
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .byte_alphabet import to_bytes
from .errors import InputError
from .reference import Merges, PythonBPE
from .sources import read_text


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}; it must hold an object")
    return data


def read_tiktoken(path: str | Path) -> dict[bytes, int]:
    """Read a tiktoken rank file: lines of a base64 token and its rank."""
    vocab: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            vocab[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path} line {number} is {line[:60]!r}; it must be a base64 token and its rank") from None
    if missing := next((byte for byte in range(256) if bytes([byte]) not in vocab), None):
        raise InputError(f"{path} lacks the single byte 0x{missing:02x}; a byte-level vocabulary holds all 256")
    return vocab


def merges_of_ranks(vocab: dict[bytes, int]) -> tuple[Merges, bool]:
    """Merges implied by ranks, and whether whole pieces are looked up first.

    tiktoken merges two neighbors whenever their concatenation is a token, lowest rank first, after looking the whole
    piece up. In a vocabulary that BPE learned, every token has just one way to come about: the two parts that its bytes
    have become when all earlier merges are done. Where some token has no such pair, every split of every token into
    two tokens is listed as a merge instead, which is tiktoken's rule written out.
    """
    by_rank = sorted(vocab, key=vocab.__getitem__)
    learned = _learned_merges(vocab, by_rank)
    if learned is not None:
        return learned, False
    splits = ((token[:i], token[i:]) for token in by_rank for i in range(1, len(token)))
    return [(left, right) for left, right in splits if left in vocab and right in vocab], True


def _learned_merges(vocab: dict[bytes, int], by_rank: list[bytes]) -> Merges | None:
    tokens = {token_id: token for token, token_id in vocab.items()}
    engine = PythonBPE(vocab, [], "gpt4", False)
    merges = []
    for token in by_rank:
        if len(token) == 1:
            continue
        parts = engine.encode_word(token)
        if len(parts) != 2:
            return None
        merges.append((tokens[parts[0]], tokens[parts[1]]))
        engine.ranks[parts[0], parts[1]] = (vocab[token], vocab[token])
    return merges


def tiktoken_lines(vocab: dict[bytes, int], merges: Merges) -> str:
    """Content of a rank file; ids are ranks, so they must rise in the order of the merges."""
    ids = [vocab[left + right] for left, right in merges]
    if ids != sorted(ids):
        raise InputError("tiktoken needs ids that rise in the order of the merges; this vocabulary's do not")
    ordered = sorted(vocab.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {token_id}\n" for token, token_id in ordered)


def read_gpt2_files(
    vocab_json: str | Path, merges_txt: str | Path, special_tokens: Iterable[str]
) -> tuple[dict[bytes, int], Merges, dict[str, int]]:
    """Read vocabulary, merges and special tokens from `vocab.json` and `merges.txt`."""
    vocab = read_json(Path(vocab_json))
    specials = {token: vocab.pop(token) for token in special_tokens if token in vocab}
    merges = []
    for number, line in enumerate(read_text(merges_txt).split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise InputError(f"{merges_txt} line {number} is {line[:60]!r}; it must be two tokens and one space")
        merges.append((to_bytes(parts[0]), to_bytes(parts[1])))
    return {to_bytes(text): token_id for text, token_id in vocab.items()}, merges, specials
