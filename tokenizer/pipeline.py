"""Parser of `tokenizer.json` pipelines: normalizer, pre-tokenizer, post-processor, decoder, added tokens.

What a file asks for is either done exactly or refused by name: a stage that would change ids and that we do not
implement is a `ValueError` which names it.

Every pre-tokenizer reduces to regular expressions whose matches, and what stands between them, are the pieces; several
of them in a row cut the pieces of the one before.
"""

import json
import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import regex

from .byte_alphabet import to_text
from .errors import InputError
from .metaspace import SPACE, Metaspace, Strip
from .patterns import FORMS, PATTERNS, PUNCTUATION, Pattern, pattern_name, pattern_steps
from .specials import SpecialTokens


def flat(stage: dict | None, members: str) -> list[dict]:
    """Flatten a stage to a list of steps."""
    if stage is None:
        return []
    if stage["type"] == "Sequence":
        return [step for inner in stage[members] for step in flat(inner, members)]
    return [stage]


def added_tokens(entries: list[dict]) -> SpecialTokens:
    """Parse the added tokens and their flags."""
    special = SpecialTokens({entry["content"]: entry["id"] for entry in entries})
    if odd := next((entry["content"] for entry in entries if entry.get("single_word")), None):
        raise InputError(f"added_tokens: {odd!r} sets single_word, which is not implemented")
    special.plain = frozenset(entry["content"] for entry in entries if not entry.get("special", True))
    for flag in ("lstrip", "rstrip", "normalized"):
        setattr(special, flag, frozenset(entry["content"] for entry in entries if entry.get(flag)))
    return special


def check_overlaps(special: SpecialTokens) -> None:
    """Refuse tokens that could overlap if one is matched before normalization and the other after it."""
    late, early = special.normalized, special.ids.keys() - special.normalized
    if not late:
        return
    begins = {token[:i] for token in early for i in range(1, len(token) + 1)}
    ends = {token[i:] for token in early for i in range(len(token))}
    strip = special.lstrip | special.rstrip
    spaced = {token for token in special.ids if token != token.strip()}
    for token in late:
        cuts = range(1, len(token))
        inside = any(token[i:j] in early for i in range(len(token)) for j in range(i + 1, len(token) + 1))
        space = (token in strip and spaced & early) or (token in spaced and strip & early)
        if inside or space or any(token[i:] in begins or token[:i] in ends for i in cuts):
            raise InputError(
                f"added_tokens: {token!r} is normalized and may overlap one that is not, which is not implemented"
            )


def normalizer_of(stage: dict | None) -> str | None:
    """Unicode normalization form of the normalizer."""
    steps = [step["type"] for step in flat(stage, "normalizers")]
    if not steps:
        return None
    if len(steps) > 1 or steps[0] not in FORMS:
        raise InputError(f"normalizer is {' + '.join(steps)}; implemented are none and {', '.join(FORMS)}")
    return steps[0]


def metaspace_of(data: dict, byte_tokens: dict[int, int]) -> tuple[str | None, Metaspace]:
    """Normalization form and `Metaspace` options of a SentencePiece pipeline."""
    form, spaced = None, False
    fields: dict[str, Any] = {}
    replaces: dict[str, str] = {}
    for number, step in enumerate(flat(data.get("normalizer"), "normalizers")):
        kind, pattern, content = step["type"], step.get("pattern", {}).get("String"), step.get("content")
        if kind in FORMS and number == 0:
            form = kind
        elif kind == "Prepend" and step["prepend"] == SPACE:
            fields = {"prefix": "always"}
        elif kind == "Replace" and pattern == " " and content == SPACE:
            spaced = True
        elif kind == "Replace" and pattern and not spaced:
            replaces[pattern] = str(content)
        else:
            raise InputError(f"normalizer holds {json.dumps(step)[:200]}, which is not implemented with byte_fallback")
    for step in flat(data.get("pre_tokenizer"), "pretokenizers"):
        kind, pattern = step["type"], step.get("pattern", {}).get("String", "")
        if kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            scheme = _scheme(step)
            fields = fields or {"prefix": scheme, "if_missing": scheme != "never"}
            spaced = True
        elif kind != "Split" or not spaced or not (" " in pattern or pattern in replaces):  # the others never match
            raise InputError(
                f"pre_tokenizer holds {json.dumps(step)[:200]}, which is not implemented with byte_fallback"
            )
    if not spaced:
        raise InputError("normalizer and pre_tokenizer leave spaces as they are, which byte_fallback needs as ▁")
    strip = _strip_of(data.get("decoder"))
    return form, Metaspace(byte_tokens, **fields, strip=strip, replaces=tuple(replaces.items()))


def _scheme(step: dict) -> str:
    """Prepend scheme of a Metaspace step; older files spell it differently."""
    return step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")


def _strip_of(stage: dict | None) -> Strip:
    """Number of leading spaces that a SentencePiece decoder strips."""
    strip: Strip = "never"
    for step in flat(stage, "decoders"):
        kind = step["type"]
        if kind == "Metaspace" and _scheme(step) != "never":
            strip = "token"
        elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            strip = "space"
        elif kind not in ("Metaspace", "ByteFallback", "Fuse") and step.get("pattern") != {"String": SPACE}:
            raise InputError(f"decoder holds {json.dumps(step)[:200]}, which is not implemented with byte_fallback")
    return strip


def pattern_of(stage: dict | None, tokens: Iterable[bytes] = ()) -> Pattern:
    """Pattern of a byte-level pre-tokenizer, for a vocabulary of `tokens`."""
    steps = flat(stage, "pretokenizers")
    levels = [number for number, step in enumerate(steps) if step["type"] == "ByteLevel"]
    if not levels:
        shown = " + ".join(step["type"] for step in steps) or "none"
        raise InputError(f"pre_tokenizer is {shown}; implemented are steps of which one is ByteLevel")
    before, level, behind = steps[: levels[-1]], steps[levels[-1]], steps[levels[-1] + 1 :]
    if level.get("add_prefix_space", True):
        raise InputError("pre_tokenizer.add_prefix_space is true, which is not implemented")
    patterns = [split_pattern(step) for step in before]
    if level.get("use_regex", True):
        patterns.append("gpt2")
    patterns += [pattern for step in behind for pattern in _byte_patterns(step, tokens)]
    patterns = patterns or [r"(?s:.)+"]
    return patterns[0] if len(patterns) == 1 else tuple(patterns)


def _byte_patterns(step: dict[str, Any], tokens: Iterable[bytes]) -> list[str]:
    """Patterns of a step behind ByteLevel, which sees text in the byte alphabet (Falcon).

    Digits there are bytes in the middle of characters too (that of ½ whose letter is ½). Such a cut changes nothing
    where no token reaches across it, so that is asked of the vocabulary instead.
    """
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        source = step["pattern"].get("Regex", "")
        if re.fullmatch(r"(\[0-9\])+", source):  # ASCII, which is the same in both alphabets
            return [source]
    if step["type"] == "Digits" and not step.get("individual_digits"):
        digits = bytes(byte for byte in range(256) if to_text(bytes([byte])).isnumeric())
        if mixed := next((token for token in tokens if 0 < len(token.translate(None, digits)) < len(token)), None):
            raise InputError(f"pre_tokenizer has Digits behind ByteLevel, which would cut the token {mixed!r}")
        return []
    raise InputError(f"pre_tokenizer holds {json.dumps(step)[:200]} behind ByteLevel, which is not implemented")


def split_pattern(step: dict[str, Any]) -> str:
    """Regular expression whose matches are the pieces of a Split step."""
    kind, behavior = step["type"], step.get("behavior", "Isolated")
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return PUNCTUATION + ("+" if behavior == "Contiguous" else "")
    if kind != "Split":
        shown = f"{kind} with behavior {behavior}" if kind == "Punctuation" else kind
        raise InputError(f"pre_tokenizer holds {shown}; implemented before ByteLevel are Split, Digits and Punctuation")
    source = step["pattern"].get("Regex")
    source = regex.escape(step["pattern"]["String"]) if source is None else source
    if not step.get("invert"):
        if behavior == "Isolated":
            known = pattern_name(source)
            return known if known and PATTERNS[known] == source else source
        if behavior == "MergedWithPrevious":
            return rf"(?s:.*?)(?:{source})|(?s:.+)"
        if behavior == "MergedWithNext":
            return rf"(?:{source})(?:(?!{source})(?s:.))*|(?:(?!{source})(?s:.))+"
        if behavior == "Contiguous":
            return rf"(?:{source})+"
    elif behavior == "Removed" and pattern_name(source):  # the pattern leaves nothing out, so nothing is removed
        return source
    raise InputError(
        f'pre_tokenizer.behavior is "{behavior}" (invert {bool(step.get("invert"))}), which is not implemented'
    )


def prefix_of(stage: dict | None) -> list[int]:
    """Special tokens that a post-processor puts before a text: those in front of the sequence of a template."""
    ids: list[int] = []
    for step in flat(stage, "processors"):
        if step["type"] != "TemplateProcessing":
            continue
        before = takewhile(lambda part: "SpecialToken" in part, step["single"])
        names = [part["SpecialToken"]["id"] for part in before]
        ids = [token_id for name in names for token_id in step["special_tokens"][name]["ids"]] + ids
    return ids


BPE_FLAGS = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
}


def stages_of(pattern: Pattern, form: str | None, metaspace: Metaspace | None) -> dict:
    """Stages of a tokenizer.json for a tokenizer that was not loaded from one."""
    normalizers: list[dict] = [{"type": form}] if form else []
    if metaspace is None:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        splits = [
            {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
            for step in pattern_steps(pattern)
        ]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*splits, {**byte_level, "use_regex": False}]}
        return {
            "normalizer": normalizers[0] if form else None,
            "pre_tokenizer": {**byte_level, "use_regex": True} if pattern_name(pattern) == "gpt2" else pre_tokenizer,
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        }
    prepends = metaspace.prefix == "always" and not metaspace.if_missing
    normalizers += [{"type": "Prepend", "prepend": SPACE}] if prepends else []
    for old, new in (*metaspace.replaces, (" ", SPACE)):
        normalizers.append({"type": "Replace", "pattern": {"String": old}, "content": new})
    step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": metaspace.prefix, "split": False}
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    decoders.append({"type": "Fuse"})
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if metaspace.strip != "never" else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None if prepends or metaspace.prefix == "never" else step,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
