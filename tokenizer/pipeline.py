"""The stages of a `tokenizer.json` as what our tokenizers know: normalizer, pre-tokenizer, added tokens and the rest.

What a file asks for is either done exactly or refused by name: a stage that would change ids and that we do not
implement is a `ValueError` which names it.

Every pre-tokenizer reduces to regular expressions whose matches, and what stands between them, are the pieces; several
of them in a row cut the pieces of the one before.
"""

from typing import Any

import regex

from .errors import InputError
from .patterns import FORMS, PATTERNS, Pattern, pattern_name
from .specials import SpecialTokens

_PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"  # Unicode's, and every ASCII sign


def flat(stage: dict | None, members: str) -> list[dict]:
    """A pipeline stage as a flat list of steps."""
    if stage is None:
        return []
    if stage["type"] == "Sequence":
        return [step for inner in stage[members] for step in flat(inner, members)]
    return [stage]


def added_tokens(entries: list[dict]) -> SpecialTokens:
    """Added tokens with their flags."""
    special = SpecialTokens({entry["content"]: entry["id"] for entry in entries})
    if odd := next((entry["content"] for entry in entries if entry.get("single_word")), None):
        raise InputError(f"added_tokens: {odd!r} sets single_word, which is not implemented")
    special.plain = frozenset(entry["content"] for entry in entries if not entry.get("special", True))
    for flag in ("lstrip", "rstrip", "normalized"):
        setattr(special, flag, frozenset(entry["content"] for entry in entries if entry.get(flag)))
    return special


def check_overlaps(special: SpecialTokens) -> None:
    """Refuse tokens that could overlap although one is looked for before normalization and the other after it."""
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
    """The Unicode normalization form that text gets."""
    steps = [step["type"] for step in flat(stage, "normalizers")]
    if not steps:
        return None
    if len(steps) > 1 or steps[0] not in FORMS:
        raise InputError(f"normalizer is {' + '.join(steps)}; implemented are none and {', '.join(FORMS)}")
    return steps[0]


def pattern_of(stage: dict | None) -> Pattern:
    """The pattern of a byte-level pre-tokenizer."""
    steps = flat(stage, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        shown = " + ".join(step["type"] for step in steps) or "none"
        raise InputError(f"pre_tokenizer is {shown}; implemented are steps that end with ByteLevel")
    if steps[-1].get("add_prefix_space", True):
        raise InputError("pre_tokenizer.add_prefix_space is true, which is not implemented")
    patterns = [split_pattern(step) for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        patterns.append("gpt2")
    patterns = patterns or [r"(?s:.)+"]
    return patterns[0] if len(patterns) == 1 else tuple(patterns)


def split_pattern(step: dict[str, Any]) -> str:
    """The regular expression whose matches are pieces as this step makes them."""
    kind, behavior = step["type"], step.get("behavior", "Isolated")
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return _PUNCTUATION + ("+" if behavior == "Contiguous" else "")
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
    """What a post-processor puts before a text: the special tokens in front of the sequence of a template."""
    ids: list[int] = []
    for step in flat(stage, "processors"):
        if step["type"] == "TemplateProcessing":
            for part in step["single"]:
                if "Sequence" in part:
                    break
                ids = [*step["special_tokens"][part["SpecialToken"]["id"]]["ids"], *ids]
    return ids
