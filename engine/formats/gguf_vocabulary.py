"""Tokenizers in GGUF metadata, read and written: byte-level BPE ("gpt2") and SentencePiece ("llama").

`tokenizer.ggml.pre` names the pretokenizer; what has no name there is not written, and a name that is not known is not
read: another way to split words would be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tokenizer.base import Tokenizer
from ...tokenizer.bpe import BPETokenizer
from ...tokenizer.byte_alphabet import from_alphabet, to_bytes, to_text
from ...tokenizer.patterns import pattern_name
from ...tokenizer.sentencepiece_files import CONTROL, NORMAL, UNUSED, USER, Piece, from_pieces, to_pieces
from ...tokenizer.specials import SpecialTokens
from ..config import ModelConfig
from ..errors import InputError

SPLITTERS = {  # our pattern by its name there
    "gpt-2": "gpt2", "smollm": "digits", "starcoder": "digits", "refact": "digits", "command-r": "digits",
    "dbrx": "gpt4", "smaug-bpe": "gpt4", "llama-bpe": "gpt4", "llama-v3": "gpt4", "llama3": "gpt4", "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2", "qwen35": "qwen3.5", "gpt-4o": "o200k", "llama4": "o200k", "tekken": "tekken",
    "deepseek-v3": "deepseek", "falcon": "falcon",
}  # fmt: skip
WHOLE_WORDS = ("llama-bpe", "llama-v3", "llama3")
PRETOKENIZERS = {  # and back
    "gpt2": "gpt-2", "digits": "smollm", "gpt4": "dbrx", "qwen2": "qwen2", "qwen3.5": "qwen35", "o200k": "gpt-4o",
    "tekken": "tekken", "deepseek": "deepseek-v3", "falcon": "falcon",
}  # fmt: skip


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> BPETokenizer | None:
    """The tokenizer of a file's metadata, or None where there is none."""
    words = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    model, pre = words.get("model", "none"), words.get("pre")
    if model == "none":
        return None
    tokens, kinds, scores = (_list(words, name, path) for name in ("tokens", "token_type", "scores"))
    kinds, scores = kinds or [1] * len(tokens), scores or [0.0] * len(tokens)
    for name, found in (("token_type", kinds), ("scores", scores)):
        if len(found) != len(tokens):
            raise InputError(f"{path}: there are {len(tokens)} tokens, but {len(found)} of {name}")
    if model == "llama":
        tokenizer = from_pieces(map(Piece, tokens, scores, kinds), prefix=words.get("add_space_prefix", True))
    elif model != "gpt2":
        raise InputError(f"{path}: tokenizer model {model!r} is not read; BPE ('gpt2', 'llama') is")
    elif pre not in SPLITTERS:
        raise InputError(f"{path}: pretokenizer {pre!r} is not read; {', '.join(SPLITTERS)} are")
    else:
        tokenizer = _read_bytes(tokens, kinds, _list(words, "merges", path), pre, path)
    special = tokenizer.special
    for role in ("bos", "eos"):
        named = words.get(f"{role}_token_id")
        if named is not None and named in special.texts:
            setattr(special, role, special.texts[named])
    if special.bos and words.get("add_bos_token", model == "llama" or pre in WHOLE_WORDS):
        tokenizer.prefix_ids = [special.ids[special.bos]]
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _read_bytes(tokens: list[str], kinds: list[int], merges: list[str], pre: str, path: Path) -> BPETokenizer:
    vocab: dict[bytes, int] = {}
    added: dict[str, int] = {}
    plain: set[str] = set()
    known: dict[str, bytes] = {}  # spelled once: merges name each token twice
    for index, (token, kind) in enumerate(zip(tokens, kinds)):
        spelled = None if kind in (CONTROL, USER) else from_alphabet(token)
        if spelled is None:
            added[token] = index
            plain |= {token} if kind == USER else set()
        elif kind != UNUSED:
            vocab[spelled] = index
            known[token] = spelled
    special = SpecialTokens(added)
    special.plain = frozenset(plain)
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space:
            raise InputError(f"{path}: a merge in tokenizer.ggml.merges is not two tokens with a space between")
        pairs.append((known.get(left) or to_bytes(left), known.get(right) or to_bytes(right)))
    return BPETokenizer(vocab, pairs, special, SPLITTERS[pre], whole_words=pre in WHOLE_WORDS)


def _list(words: dict[str, Any], name: str, path: Path) -> list:
    found = words.get(name, [])
    kind = {"token_type": int, "scores": float}.get(name, str)
    if not isinstance(found, list) or (found and type(found[0]) is not kind):
        raise InputError(f"{path}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
    return found


def write_vocabulary(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    """Metadata of a tokenizer; "none" for a model without."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if not isinstance(tokenizer, BPETokenizer):
        raise InputError(f"a {type(tokenizer).__name__} has no GGUF form: only BPE has")
    words = _write_pieces(tokenizer, config) if tokenizer.metaspace else _write_bytes(tokenizer, config)
    words["add_bos_token"] = bool(tokenizer.prefix_ids)
    if tokenizer.eos_id is not None:
        bos = tokenizer.special.ids.get(tokenizer.special.bos or "", tokenizer.eos_id)
        words |= {"eos_token_id": tokenizer.eos_id, "bos_token_id": bos}
    facts = {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return facts | template


def _write_pieces(tokenizer: BPETokenizer, config: ModelConfig) -> dict[str, Any]:
    if tokenizer.normalizer:
        raise InputError(f"the normalizer {tokenizer.normalizer} has no GGUF form with SentencePiece")
    pieces = to_pieces(tokenizer)
    unused = (Piece(f"[PAD{index}]", 0.0, UNUSED) for index in range(config.vocab_size))
    tokens, scores, kinds = zip(*(pieces.get(index, pad) for index, pad in enumerate(unused)))
    prefix = tokenizer.metaspace.prefix == "always"
    return {"model": "llama", "tokens": list(tokens), "scores": list(scores), "token_type": list(kinds),
            "add_space_prefix": prefix}  # fmt: skip


def _write_bytes(tokenizer: BPETokenizer, config: ModelConfig) -> dict[str, Any]:
    splitter = pattern_name(tokenizer.pattern)
    if splitter not in PRETOKENIZERS or tokenizer.normalizer:
        raise InputError(
            f"the pretokenizer has no GGUF form: only the patterns {', '.join(PRETOKENIZERS)} have names there"
        )
    tokens, kinds = [f"[PAD{index}]" for index in range(config.vocab_size)], [UNUSED] * config.vocab_size
    for token, index in tokenizer.vocab.items():
        tokens[index], kinds[index] = to_text(token), NORMAL
    for token, index in tokenizer.special_tokens.items():
        tokens[index], kinds[index] = token, USER if token in tokenizer.special.plain else CONTROL
    pre = "llama-bpe" if tokenizer.whole_words and splitter == "gpt4" else PRETOKENIZERS[splitter]
    merges = [f"{to_text(a)} {to_text(b)}" for a, b in tokenizer.merges]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
