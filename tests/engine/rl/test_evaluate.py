"""Evaluation by tasks."""

import itertools
import re
from statistics import fmean

import pytest
import torch

from warploom.engine.cli import main
from warploom.engine.formats.model_directory import load_model
from warploom.engine.rl.evaluate import evaluate_choices, evaluate_task, pass_at_k
from warploom.engine.rl.prompts import sample_seed
from warploom.engine.serving import LLM
from warploom.engine.tasks import open_task


def test_pass_at_k_equals_all_draws():
    for samples, right, k in ((5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)):
        scores = [1] * right + [0] * (samples - right)
        assert pass_at_k(samples, right, k) == pytest.approx(fmean(map(max, itertools.combinations(scores, k))))


def test_sample_seeds_differ_by_row_and_step():
    seeds = {sample_seed(0, step, row) for step in range(50) for row in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


def test_evaluation_is_the_same_in_any_batch(base):
    task, found = open_task("sums:2"), []
    for max_batch in (2, 64):
        llm = LLM(base, device="cpu", dtype="float32", max_batch=max_batch)
        found.append(evaluate_task(llm, task, 20, 4, max_tokens=8))
    assert found[0] == found[1]
    assert found[0].pass_at.keys() == {2, 4} and found[0].accuracy <= found[0].pass_at[2] <= found[0].pass_at[4]


def test_choices_are_the_likeliest(base):
    model, tokenizer = load_model(base, "cpu", torch.float32)
    task, right = open_task("brackets"), 0
    for index in range(12):
        row = task.row(0, index)
        start, scores = tokenizer.encode(row["question"]), {}
        for choice in row["choices"]:
            ids = torch.tensor([start + tokenizer.encode(choice)])
            with torch.no_grad():
                scores[choice] = float(model.log_probs(ids[:, :-1], ids[:, 1:])[0, len(start) - 1 :].sum())
        right += max(scores, key=scores.get) == row["answer"]
    assert evaluate_choices(LLM(base, device="cpu", dtype="float32"), task, 12).accuracy == right / 12


def test_eval_verb_answers_a_task(base, tmp_path, capsys):
    argv = ["--device", "cpu", "--limit", "6", "--max-tokens", "6"]
    assert main(["eval", str(base), "tasks:brackets:2", *argv, "--samples", "2"]) == 0
    assert (
        "brackets: accuracy 0." in (said := capsys.readouterr().out) and "pass@2" in said and "wrong: 'balanced" in said
    )
    assert main(["eval", str(base), "tasks:brackets:2", *argv, "--choices"]) == 0
    assert main(["eval", str(base), "tasks:nothing"]) == 2
    assert main(["eval", str(base), "tasks:addition", "--choices"]) == 2
    assert "has no choices" in capsys.readouterr().err


def test_train_reads_a_task(tmp_path, capsys):
    out = str(tmp_path / "run")
    argv = ["--tokenizer", "char", "--steps", "2", "--d-model", "32", "--n-layers", "1", "--n-heads", "2"]
    assert main(["train", "tasks:addition:1", "--out", out, *argv, "--n-kv-heads", "1", "--device", "cpu"]) == 0
    assert main(["eval", out, "tasks:addition:1", "--limit", "4", "--max-tokens", "8", "--device", "cpu"]) == 0
    assert main(["train", "tasks:reasoning-gym/chain_sum", "--out", out + "2"]) == 2


def test_eval_problems_are_in_no_training_data(base, capsys):
    assert main(["eval", str(base), "tasks:reversal:5", "--limit", "3", "--max-tokens", "4", "--device", "cpu"]) == 0
    asked = set(re.findall(r"'(reverse \w+: )'", capsys.readouterr().out))
    assert len(asked) == 3 and asked.isdisjoint(question for question, _ in open_task("reversal:5").solved(1000))
