"""Mistakes in flags as one sentence: tyro's error boxes, and what argparse prints behind a usage."""

from __future__ import annotations

import argparse
import itertools
import re
from typing import NoReturn

from ..errors import InputError
from .help_text import STYLE

LONG = 120  # characters: what takes more to explain, --help explains
MEANT = "Perhaps you meant:"
KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "{[INT FLOAT [INT FLOAT ...]]}": "pairs of a token id and a number",
}
WORDED = (
    (r"Error parsing (-\S+): no type matching (?:\{None\}\|)?(.+?) could be instantiated from (\[.*?\])\.? .*",
     lambda found: f"{found[1]} must be {KINDS.get(found[2], found[2])}, not {found[3][1:-1]}"),
    (r"Error parsing (-\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 must be a whole number, not \2"),
    (r"Error parsing (-\S+): could not convert string to float: (.*)", r"\1 must be a number, not \2"),
    (r"Error parsing (-\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1 cannot be \2"),
    (r"Error parsing \[.*\]: Could not find valid parse for arguments: \[(.*)\]", r"the arguments cannot be \1"),
    (r"Error parsing [^-]\S*: (.*)", r"\1"),  # a check of several flags together
    (r"Missing value for argument '(?:\w+\.)?(\w+)'\. .*", lambda found: f"{found[1].upper()} is missing"),
    (r"Missing value for argument '(-\S+)'\. .*", r"\1 needs a value"),
    (r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\.",
     lambda found: f"{found[2]} must be {_one_of(found[3])}, not '{found[1]}'"),
)  # fmt: skip
"""Error messages of tyro (regular expressions) and their replacements."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence, too."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


def sentence_of(box: str) -> str:
    """Extract the sentence from tyro's error box (drawn in ASCII where the terminal has no more): its text up to the
    first rule, and the suggested flags."""
    drawn = [line.strip("│╭╰╮╯|+\n") for line in STYLE.sub("", box).splitlines()]
    parts = [list(part) for is_rule, part in itertools.groupby(drawn[1:], _is_rule) if not is_rule]
    if parts[0][0].strip().startswith("Missing from"):
        return _missing(parts[0][1:])
    told = " ".join(" ".join(parts[0]).split())
    for pattern, words in WORDED:
        if re.fullmatch(pattern, told):
            told = re.sub(pattern, words, told)
            break
    lines = [[line.strip() for line in part] for part in parts]
    meant = [line.split()[0] for part in lines if MEANT in part for line in part if line.startswith("--")]
    return f"{told}; perhaps {' or '.join(meant)}" if meant else told


def _missing(lines: list[str]) -> str:
    """Which arguments and flags are required, with the explanation where there is one: their names stand in the box
    less far to the right than what explains them."""
    edge = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    names = [line.split()[0] for line in lines if line[edge : edge + 1].strip()]
    if len(names) > 1:
        return f"{', '.join(names[:-1])} and {names[-1]} are missing"
    explained = " ".join(" ".join(lines[1:]).split()).removesuffix("(required)").rstrip(" .")
    return f"{names[0]} is missing: {explained}" if 0 < len(explained) < LONG else f"{names[0]} is missing"


def _one_of(quoted: str) -> str:
    """Words in quotation marks, in an order that does not change from run to run."""
    words = sorted(word for word in re.findall(r"'(.*?)'", quoted) if word != "None")
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _is_rule(line: str) -> bool:
    line = line.strip()
    return len(line) > 2 and set(line) <= {"─", "-"}
