"""tyro's error boxes as one sentence."""

from __future__ import annotations

import itertools
import re

MEANT = "Perhaps you meant:"


def sentence_of(box: str) -> str:
    """Extract the sentence from tyro's error box, which is drawn in ASCII for terminals without more: its text up to
    the first rule, and the flags that it thinks of."""
    lines = [line.strip("│╭╰╮╯ \n") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    parts = [list(part) for is_rule, part in itertools.groupby(lines[1:], _is_rule) if not is_rule]
    told = re.sub(
        r"no type matching (?:\{None\}\|)?(\S+) could be instantiated from \['(.*?)'\].*",
        r"it must be \1, not '\2'",
        " ".join(" ".join(parts[0]).split()),
    )
    meant = [line.split()[0] for part in parts if MEANT in part for line in part if line.startswith("--")]
    return f"{told}; perhaps {' or '.join(meant)}" if meant else told


def _is_rule(line: str) -> bool:
    return len(line) > 2 and set(line) <= {"─", "-"}
