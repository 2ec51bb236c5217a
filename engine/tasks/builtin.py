"""Built-in synthetic tasks: generators (draw, level) → row; `level` grades the difficulty."""

from __future__ import annotations

import datetime
import random
import string
from collections.abc import Callable
from typing import NamedTuple

from .task import Row


def addition(draw: random.Random, digits: int) -> Row:
    a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return {"question": f"{a}+{b}=", "answer": str(a + b), "work": f"<{','.join(steps)}>"}


def sums(draw: random.Random, count: int) -> Row:
    """Last digit of a sum, with a running total digit by digit as chain of thought."""
    digits = [draw.randrange(10) for _ in range(count)]
    totals = (f"{digit}{sum(digits[:number]) % 10}" for number, digit in enumerate(digits, 1))
    work = f"<{''.join(totals)}>"
    return {"question": f"{'+'.join(map(str, digits))}=", "answer": str(sum(digits) % 10), "work": work}


def sorting(draw: random.Random, count: int) -> Row:
    numbers = [draw.randrange(100) for _ in range(count)]
    shown = (" ".join(map(str, each)) for each in (numbers, sorted(numbers)))
    return {"question": f"sort {next(shown)}: ", "answer": next(shown)}


def reversal(draw: random.Random, length: int) -> Row:
    word = "".join(draw.choice(string.ascii_lowercase) for _ in range(length))
    return {"question": f"reverse {word}: ", "answer": word[::-1]}


PAIRS = {"(": ")", "[": "]", "{": "}"}


def brackets(draw: random.Random, pairs: int) -> Row:
    """Balanced brackets: yes or no; half of the rows have one bracket changed."""
    text, waiting, left = [], [], pairs
    while left or waiting:
        if left and (not waiting or draw.random() < 0.5):
            opened = draw.choice("([{")
            text.append(opened)
            waiting.append(PAIRS[opened])
            left -= 1
        else:
            text.append(waiting.pop())
    balanced = draw.random() < 0.5
    if not balanced:
        place = draw.randrange(len(text))
        text[place] = draw.choice([mark for mark in "()[]{}" if mark != text[place]])
    answer = "yes" if balanced else "no"
    return {"question": f"balanced {''.join(text)}: ", "answer": answer, "choices": ("yes", "no")}


def dates(draw: random.Random, days: int) -> Row:
    start = datetime.date(2000, 1, 1) + datetime.timedelta(draw.randrange(20_000))
    shift = draw.randint(1, days)
    end = start + datetime.timedelta(shift)
    return {"question": f"{start} + {shift} days = ", "answer": str(end)}


class Builtin(NamedTuple):
    """Registry entry of a task: generator, default level, meaning of the level, share of documents with the work."""

    make: Callable[[random.Random, int], Row]
    level: int
    counts: str
    think: float = 0.0


BUILTIN = {
    "addition": Builtin(addition, 3, "digits of both numbers", 0.5),
    "sums": Builtin(sums, 8, "digits whose sum's last digit is asked for", 0.15),
    "sorting": Builtin(sorting, 4, "numbers"),
    "reversal": Builtin(reversal, 5, "letters"),
    "brackets": Builtin(brackets, 5, "pairs"),
    "dates": Builtin(dates, 30, "days at most"),
}
