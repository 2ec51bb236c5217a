"""Loading of tokenizers: `tokenizer.json`, `tokenizer.model`, `tekken.json`, and the config files beside them.

What a file asks for is either done exactly or refused by name (pipeline.py). What does not change ids (post-processors,
chat templates) is kept, and saved as it was read.
"""

import base64
import json
import re
from pathlib import Path

from .base import Tokenizer
from .bpe import BPETokenizer
from .byte_alphabet import to_bytes
from .errors import InputError
from .metaspace import SPACE, bytes_of, pattern_for
from .pipeline import added_tokens, check_overlaps, flat, metaspace_of, normalizer_of, pattern_of, prefix_of
from .rank_files import merges_of_ranks, read_json
from .sentencepiece_files import read_sentencepiece
from .sources import read_text
from .specials import SpecialTokens
from .words import CharTokenizer, WordTokenizer, is_char_split, is_word_split

FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
_TEKKEN_SPECIALS = [  # of files that do not list theirs; the rest are <SPECIAL_20> and so on
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_FIXED = ("type", "vocab", "merges", "dropout")  # of a model: what is not kept as it was read


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a directory that holds one of `FILES`, or from such a file."""
    path = Path(path)
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise InputError(f"{path} is neither a tokenizer file nor a directory with one of {', '.join(FILES)}")

    tokenizer = read_sentencepiece(file) if file.suffix == ".model" else _read_json_tokenizer(file)
    _read_neighbors(tokenizer, file.parent)
    return tokenizer


def _read_json_tokenizer(file: Path) -> Tokenizer:
    data = read_json(file)
    is_tekken = isinstance(data.get("vocab"), list)
    try:
        return _from_tekken(data) if is_tekken else _from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{file}: {error}") from None
        name = "tekken.json" if is_tekken else "tokenizer.json"
        raise InputError(f"{file} is not a complete {name}: {type(error).__name__} {error}") from None


def _read_neighbors(tokenizer: Tokenizer, directory: Path) -> None:
    """Read the tokenizer settings of a model directory's other files (chat template, stop ids …)."""

    def read(name: str) -> dict:
        return read_json(directory / name) if (directory / name).is_file() else {}

    jinja_file = directory / "chat_template.jinja"
    tokenizer.config = config = read("tokenizer_config.json")
    tokenizer.chat_template = read_text(jinja_file) if jinja_file.is_file() else _template_of(config)
    names = {**read("special_tokens_map.json"), **config}
    for role in ("bos", "eos"):
        name = names.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name in tokenizer.special.ids:
            setattr(tokenizer.special, role, name)
    tokenizer.special.stops = read_stop_ids(directory)


def read_stop_ids(directory: Path) -> frozenset[int]:
    """All ids that a model directory's files name as `eos_token_id`.

    The union, because neither file alone is right: Phi-3.5's generation_config.json lacks one that its config.json has.
    """
    named: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        values = read_json(directory / file) if (directory / file).is_file() else {}
        for part in (values, values.get("text_config") or {}):
            ids = part.get("eos_token_id")
            named |= {token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)}
    return frozenset(named)


def _template_of(config: dict) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {item["name"]: item["template"] for item in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def _from_json(data: dict) -> Tokenizer:
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "?")
    special = added_tokens(data.get("added_tokens") or [])
    if kind == "BPE":
        tokenizer = _bpe_from_json(data, model, special)
    elif kind == "WordLevel":
        tokenizer = _words_from_json(data, model, special)
    else:
        raise InputError(f'model.type is "{kind}"; implemented are "BPE" and "WordLevel"')
    tokenizer.prefix_ids = prefix_of(data.get("post_processor"))
    return tokenizer


def _bpe_from_json(data: dict, model: dict, special: SpecialTokens) -> BPETokenizer:
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise InputError(f"model.{field} is {model[field]!r}, which is not implemented")
    check_overlaps(special)
    entries = model["vocab"].items()
    pairs = [_halves(merge, model["vocab"]) for merge in model["merges"]]
    in_merges = {part for left, right in pairs for part in (left, right, left + right)}
    # Special tokens are often listed in the vocabulary too, and vocabulary among the added tokens.
    listed = {text: i for text, i in entries if special.ids.get(text) == i and text not in in_merges}
    spelled = {text: token_id for text, token_id in entries if text not in listed}
    read = _read_pieces if model.get("byte_fallback") else _read_byte_level
    tokens, options = read(data, spelled)
    vocab = {token: spelled[text] for text, token in tokens.items()}
    if len(vocab) != len(tokens):
        raise InputError("model.vocab spells one token in two ways, with a space and with ▁, which is not implemented")
    merges = [(tokens[left], tokens[right]) for left, right in pairs]
    whole_words = bool(model.get("ignore_merges"))
    if "metaspace" in options:
        options["pattern"] = pattern_for(merges, whole_words)
    elif model.get("unk_token") and None in bytes_of(vocab, None):
        raise InputError(f"model.unk_token is {model['unk_token']!r} and bytes are missing, which is not implemented")
    tokenizer = BPETokenizer(vocab, merges, special, whole_words=whole_words, **options)
    stages = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    kept = {name: value for name, value in model.items() if name not in _FIXED}
    tokenizer.loaded = {name: data.get(name) for name in stages} | {"model": kept, "vocab": listed}
    return tokenizer


def _halves(merge: object, vocab: dict[str, int]) -> tuple[str, str]:
    """Split a merge into its two tokens; neither may be empty, so that no merge can contain itself."""
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(left), str(right)] if left and right:
            if left in vocab and right in vocab and left + right in vocab:
                return left, right
            lacking = next(part for part in (left, right, left + right) if part not in vocab)
            raise InputError(f"model.merges has {merge!r}, and model.vocab lacks {lacking!r}")
    raise InputError(f"model.merges has {merge!r}, which is not two tokens")


def _read_byte_level(data: dict, spelled: dict[str, int]) -> tuple[dict[str, bytes], dict]:
    """Tokens of a byte-level vocabulary, and BPETokenizer's options for it."""
    decoder = data.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise InputError(
            f"decoder.type is {decoder.get('type')!r}; implemented are ByteLevel, and SentencePiece with byte_fallback"
        )
    tokens = {text: to_bytes(text) for text in spelled}
    pattern = pattern_of(data.get("pre_tokenizer"), tokens.values())
    return tokens, {"pattern": pattern, "normalizer": normalizer_of(data.get("normalizer"))}


def _read_pieces(data: dict, spelled: dict[str, int]) -> tuple[dict[str, bytes], dict]:
    """Tokens of a SentencePiece vocabulary, and BPETokenizer's options for it."""
    alone = {text: int(text[3:5], 16) for text in spelled if len(text) == 6 and _BYTE_TOKEN.fullmatch(text)}
    form, metaspace = metaspace_of(data, {byte: spelled[text] for text, byte in alone.items()})
    tokens = {text: text.replace(SPACE, " ").encode() for text in spelled if text not in alone}
    return tokens, {"normalizer": form, "metaspace": metaspace}


def _from_tekken(data: dict) -> BPETokenizer:
    """Load Mistral's tekken.json: tiktoken ranks, of which the first few are used, after the special tokens."""
    config = data["config"]
    first = int(config["default_num_special_tokens"])
    entries = data["vocab"][: int(config["default_vocab_size"]) - first]
    ranks = {base64.b64decode(entry["token_bytes"], validate=True): entry["rank"] for entry in entries}
    if len(ranks) != len(entries) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError("vocab must hold each of its tokens once, and all 256 bytes")
    merges, whole_words = merges_of_ranks(ranks)
    listed = data.get("special_tokens")
    named = {entry["rank"]: entry["token_str"] for entry in listed} if listed else dict(enumerate(_TEKKEN_SPECIALS))
    special = {named.get(rank, f"<SPECIAL_{rank}>"): rank for rank in range(first)}
    vocab = {token: rank + first for token, rank in ranks.items()}
    tokenizer = BPETokenizer(vocab, merges, special, config["pattern"], whole_words=whole_words)
    tokenizer.prefix_ids = [special["<s>"]] if "<s>" in special else []
    return tokenizer


def _words_from_json(data: dict, model: dict, special: SpecialTokens) -> Tokenizer:
    vocab = {token: token_id for token, token_id in model["vocab"].items() if special.ids.get(token) != token_id}
    unknown = model["unk_token"]
    steps = flat(data.get("pre_tokenizer"), "pretokenizers")
    source = steps[0].get("pattern", {}).get("Regex", "") if len(steps) == 1 else ""
    normalizers = [step["type"] for step in flat(data.get("normalizer"), "normalizers")]
    if is_char_split(source) and not normalizers:
        return CharTokenizer(vocab, special, unknown)
    if is_word_split(source) and normalizers in ([], ["Lowercase"]):
        return WordTokenizer(vocab, special, unknown, lowercase=bool(normalizers))
    raise InputError(
        "pre_tokenizer of this WordLevel model is not one that CharTokenizer or WordTokenizer writes: "
        f"{json.dumps(data.get('pre_tokenizer'))[:200]}"
    )
