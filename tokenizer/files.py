"""Loading: `tokenizer.json` and what lies beside it in a model directory.

What a file asks for is either done exactly or refused by name (pipeline.py). What does not change ids (post-processors,
chat templates) is kept, and saved as it was read.
"""

import json
from pathlib import Path

from .base import Tokenizer
from .bpe import BPETokenizer
from .byte_alphabet import to_bytes
from .errors import InputError
from .pipeline import added_tokens, check_overlaps, flat, normalizer_of, pattern_of, prefix_of
from .rank_files import read_json
from .sources import read_text
from .specials import SpecialTokens
from .words import CharTokenizer, WordTokenizer, is_char_split, is_word_split

_FIXED = ("type", "vocab", "merges", "dropout")  # of a model: what is not kept as it was read


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a directory that holds `tokenizer.json`, or from such a file."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} is neither a tokenizer.json nor a directory that holds one")
    data = read_json(file)
    try:
        tokenizer = _from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a complete tokenizer.json: {type(error).__name__} {error}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    _read_neighbors(tokenizer, file.parent)
    return tokenizer


def _read_neighbors(tokenizer: Tokenizer, directory: Path) -> None:
    """What other files of a model directory say about its tokenizer."""

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
    """The ids that a model directory's files name as `eos_token_id`, all together.

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
    for field in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise InputError(f"model.{field} is {model[field]!r}, which a byte-level BPE here does not implement")
    decoder = data.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise InputError(f"decoder.type is {decoder.get('type')!r}; only byte-level BPE is implemented (ByteLevel)")
    vocab, listed = {}, {}
    for text, token_id in model["vocab"].items():
        if special.ids.get(text) == token_id:
            listed[text] = token_id
        else:
            vocab[to_bytes(text)] = token_id
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((to_bytes(left), to_bytes(right)))
    check_overlaps(special)
    tokenizer = BPETokenizer(
        vocab,
        merges,
        special,
        pattern_of(data.get("pre_tokenizer")),
        whole_words=bool(model.get("ignore_merges")),
        normalizer=normalizer_of(data.get("normalizer")),
    )
    stages = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    kept = {name: value for name, value in model.items() if name not in _FIXED}
    tokenizer.loaded = {name: data.get(name) for name in stages} | {"model": kept, "vocab": listed}
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
