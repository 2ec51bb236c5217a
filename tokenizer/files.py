"""File formats: `tokenizer.json` (Hugging Face), tiktoken rank files, GPT-2's `vocab.json` and `merges.txt`.

What a file asks for is either done exactly or refused by name: a field that would change ids and that we do not
implement is a `ValueError` which names it. What does not change ids (post-processors, chat templates) is kept.
"""

import base64
import binascii
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .base import Tokenizer
from .bpe import END_OF_TEXT, NORMALIZERS, BPETokenizer
from .byte_alphabet import to_bytes
from .patterns import PATTERNS, pattern_name
from .reference import PythonBPE
from .sources import write_text
from .words import CharTokenizer, WordTokenizer, is_char_split, is_word_split

_TOKEN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a directory that holds `tokenizer.json`, or from such a file."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is neither a tokenizer.json nor a directory that holds one")
    data = _read_json(file)
    try:
        tokenizer = _from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a complete tokenizer.json: {type(error).__name__} {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    config_file, jinja_file = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
    config = _read_json(config_file) if config_file.is_file() else {}
    tokenizer.config_extras = config
    tokenizer.chat_template = jinja_file.read_text("utf-8") if jinja_file.is_file() else _template_of(config)
    for role in ("bos", "eos"):
        name = config.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name in tokenizer.special.ids:
            setattr(tokenizer.special, role, name)
    tokenizer.special.stops = read_stop_ids(file.parent)
    return tokenizer


def read_stop_ids(directory: Path) -> frozenset[int]:
    """The ids that a model directory's files name as `eos_token_id`, all together.

    The union, because neither file alone is right: Phi-3.5's generation_config.json lacks one that its config.json has.
    """
    named: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        values = _read_json(directory / file) if (directory / file).is_file() else {}
        for part in (values, values.get("text_config") or {}):
            ids = part.get("eos_token_id")
            named |= {token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)}
    return frozenset(named)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`."""
    directory = Path(directory)
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **_TOKEN_FLAGS, "normalized": False, "special": True}
            for token, token_id in sorted(tokenizer.special.ids.items(), key=lambda item: item[1])
        ],
        **tokenizer._to_json(),
    }
    for entry in data["added_tokens"]:
        entry["special"] = entry["content"] not in tokenizer.special.plain
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **getattr(tokenizer, "config_extras", {}),
        **tokenizer.special.roles(),
    }
    config.pop("chat_template", None)
    write_text(directory / "tokenizer.json", json.dumps(data, ensure_ascii=False))
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
        write_text(directory / "chat_template.jinja", tokenizer.chat_template)
    write_text(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; it must hold an object")
    return data


def _template_of(config: dict) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {item["name"]: item["template"] for item in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def _from_json(data: dict) -> Tokenizer:
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "?")
    specials, plain = _added_tokens(data.get("added_tokens") or [])
    if kind == "BPE":
        tokenizer = _bpe_from_json(data, model, specials)
    elif kind == "WordLevel":
        tokenizer = _words_from_json(data, model, specials)
    else:
        raise ValueError(f'model.type is "{kind}"; implemented are "BPE" (byte-level) and "WordLevel"')
    tokenizer.special.plain = plain
    return tokenizer


def _added_tokens(entries: list[dict]) -> tuple[dict[str, int], set[str]]:
    """The ids of added tokens, and which of them are not special (Qwen's <tool_call>, say)."""
    ids: dict[str, int] = {}
    plain = set()
    for entry in entries:
        for flag in ("single_word", "lstrip", "rstrip"):
            if entry.get(flag):
                raise ValueError(f"added_tokens: {entry['content']!r} sets {flag}, which is not implemented")
        ids[entry["content"]] = entry["id"]
        if not entry.get("special", True):
            plain.add(entry["content"])
    return ids, plain


def _bpe_from_json(data: dict, model: dict, specials: dict[str, int]) -> BPETokenizer:
    for field in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise ValueError(f"model.{field} is {model[field]!r}, which a byte-level BPE here does not implement")
    decoder = data.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise ValueError(f"decoder.type is {decoder.get('type')!r}; only byte-level BPE is implemented (ByteLevel)")
    vocab = {}
    for text, token_id in model["vocab"].items():
        if specials.get(text) != token_id:
            vocab[to_bytes(text)] = token_id
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((to_bytes(left), to_bytes(right)))
    tokenizer = BPETokenizer(
        vocab,
        merges,
        specials,
        _pattern_of(data.get("pre_tokenizer")),
        whole_words=bool(model.get("ignore_merges")),
        normalizer=_normalizer_of(data.get("normalizer")),
    )
    tokenizer.json_extras = {"post_processor": data.get("post_processor")}
    return tokenizer


def _flat(part: dict | None, members: str) -> list[dict]:
    """A pipeline stage as a flat list of steps."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[members] for step in _flat(inner, members)]
    return [part]


def _normalizer_of(part: dict | None) -> str | None:
    steps = [step["type"] for step in _flat(part, "normalizers")]
    if not steps:
        return None
    if len(steps) > 1 or steps[0] not in NORMALIZERS:
        raise ValueError(f"normalizer is {' + '.join(steps)}; implemented are none and {', '.join(NORMALIZERS)}")
    return steps[0]


def _pattern_of(part: dict | None) -> str:
    steps = _flat(part, "pretokenizers")
    shown = " + ".join(step["type"] for step in steps) or "none"
    if not steps or steps[-1]["type"] != "ByteLevel" or len(steps) > 2:
        raise ValueError(f"pre_tokenizer is {shown}; implemented are ByteLevel and Split + ByteLevel")
    last = steps[-1]
    if last.get("add_prefix_space", True):
        raise ValueError("pre_tokenizer.add_prefix_space is true, which is not implemented")
    if len(steps) == 1:
        return "gpt2" if last.get("use_regex", True) else r"(?s:.)+"
    if last.get("use_regex", True):
        raise ValueError("pre_tokenizer.use_regex is true after a Split, which is not implemented")
    return _split_pattern(steps[0])


def _split_pattern(step: dict) -> str:
    if step["type"] != "Split" or "Regex" not in step["pattern"]:
        raise ValueError(f"pre_tokenizer is {step['type']} with {step.get('pattern')}; implemented is Split by a Regex")
    source = step["pattern"]["Regex"]
    known = pattern_name(source)
    behavior, invert = step["behavior"], step["invert"]
    if (behavior, invert) != ("Isolated", False) and not (known and (behavior, invert) == ("Removed", True)):
        raise ValueError(f'pre_tokenizer.behavior is "{behavior}" (invert {invert}); implemented is "Isolated"')
    return known if known and PATTERNS.get(known) == source else source


def prefix_of(processor: dict | None) -> list[int]:
    """What a post-processor puts before a text: the special tokens in front of the sequence of a template."""
    ids: list[int] = []
    for step in _flat(processor, "processors"):
        if step["type"] == "TemplateProcessing":
            for part in step["single"]:
                if "Sequence" in part:
                    break
                ids = [*step["special_tokens"][part["SpecialToken"]["id"]]["ids"], *ids]
    return ids


def _words_from_json(data: dict, model: dict, specials: dict[str, int]) -> Tokenizer:
    vocab = {token: token_id for token, token_id in model["vocab"].items() if specials.get(token) != token_id}
    unknown = model["unk_token"]
    steps = _flat(data.get("pre_tokenizer"), "pretokenizers")
    source = steps[0].get("pattern", {}).get("Regex", "") if len(steps) == 1 else ""
    normalizers = [step["type"] for step in _flat(data.get("normalizer"), "normalizers")]
    if is_char_split(source) and not normalizers:
        return CharTokenizer(vocab, specials, unknown)
    if is_word_split(source) and normalizers in ([], ["Lowercase"]):
        return WordTokenizer(vocab, specials, unknown, lowercase=bool(normalizers))
    raise ValueError(
        "pre_tokenizer of this WordLevel model is not one that CharTokenizer or WordTokenizer writes: "
        f"{json.dumps(data.get('pre_tokenizer'))[:200]}"
    )


# -- tiktoken ---------------------------------------------------------------------------------------------------------


def read_tiktoken(path: str | Path, pattern: str, special_tokens: dict[str, int] | None) -> BPETokenizer:
    """A tokenizer from tiktoken's rank file, whose merges are implied.

    tiktoken merges two neighbors whenever their concatenation is a token, lowest rank first, after looking the whole
    piece up. In a vocabulary that BPE learned, every token has just one way to come about: the two parts that its bytes
    have become when all earlier merges are done. Where some token has no such pair, every split of every token into
    two tokens is listed as a merge instead, which is tiktoken's rule written out.
    """
    vocab: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            vocab[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path} line {number} is {line[:60]!r}; it must be a base64 token and its rank") from None
    by_rank = sorted(vocab, key=vocab.__getitem__)
    if missing := next((byte for byte in range(256) if bytes([byte]) not in vocab), None):
        raise ValueError(f"{path} lacks the single byte 0x{missing:02x}; a byte-level vocabulary holds all 256")
    merges = _implied_merges(vocab, by_rank)
    whole_words = merges is None
    if merges is None:
        merges = [
            (token[:i], token[i:])
            for token in by_rank
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
    return BPETokenizer(vocab, merges, special_tokens, pattern, whole_words=whole_words)


def _implied_merges(vocab: dict[bytes, int], by_rank: list[bytes]) -> list[tuple[bytes, bytes]] | None:
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


def tiktoken_lines(tokenizer: BPETokenizer) -> str:
    """The content of a rank file; ids are the ranks, so they must rise in the order of the merges."""
    ids = [tokenizer.vocab[left + right] for left, right in tokenizer.merges]
    if ids != sorted(ids):
        raise ValueError("tiktoken needs ids that rise in the order of the merges; this vocabulary's do not")
    ordered = sorted(tokenizer.vocab.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {token_id}\n" for token, token_id in ordered)


# -- GPT-2 ------------------------------------------------------------------------------------------------------------


def read_gpt2_files(
    vocab_json: str | Path,
    merges_txt: str | Path,
    special_tokens: Iterable[str] = (END_OF_TEXT,),
    pattern: str = "gpt2",
) -> BPETokenizer:
    """A tokenizer from `vocab.json` and `merges.txt`."""
    vocab: dict[str, Any] = _read_json(Path(vocab_json))
    specials = {token: vocab.pop(token) for token in special_tokens if token in vocab}
    merges = []
    for number, line in enumerate(Path(merges_txt).read_text("utf-8").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"{merges_txt} line {number} is {line[:60]!r}; it must be two tokens and one space")
        merges.append((to_bytes(parts[0]), to_bytes(parts[1])))
    return BPETokenizer({to_bytes(text): token_id for text, token_id in vocab.items()}, merges, specials, pattern)
