"""lm-evaluation-harness against the server, as its users run it: its figures are those of scoring in process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from warploom.engine.serving import LLM, SamplingParams

from .conftest import CONTEXT, make_model, make_tokenizer

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
if find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval: pip install 'lm_eval[api]'", allow_module_level=True)

DOCUMENTS = [
    {"question": "What does a loom do?", "choices": ["It weaves", "It sings"], "answer": 0},
    {"question": "Où est la navette ?", "choices": ["dans la mer", "sur le métier"], "answer": 1},
    {"question": "2 + 2 =", "choices": ["four", "five", "a number"], "answer": 0},
]
TASKS = {
    "weaving_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "weaving_words": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def evaluated(server, tmp_path_factory):
    """Each task's samples, and its results."""
    folder = tmp_path_factory.mktemp("lm_eval")
    make_tokenizer().save(folder)
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
        whole = {"task": name, "test_split": "test", **files, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": folder,
        "tokenizer_backend": "huggingface",
        "max_length": CONTEXT - 1,
        "num_concurrent": 4,
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", ",".join(TASKS)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", folder, "--output_path", folder / "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]

    def samples(name):
        lines = next((folder / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])

    return {name: samples(name) for name in TASKS}, results


@pytest.fixture(scope="module")
def llm():
    return LLM(make_model(), make_tokenizer())


def test_lm_eval_equals_scoring_in_process(evaluated, llm):
    """Likelihoods and accuracy equal scoring in process."""
    samples, results = evaluated
    right = 0
    for document, sample in zip(DOCUMENTS, samples["weaving_choice"]):
        context = f"Q: {document['question']}\nA:"
        scores = llm.score([f"{context} {choice}" for choice in document["choices"]])
        ours = [sum(score[len(context.encode()) - 1 :]) for score in scores]
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)
        right += max(range(len(ours)), key=ours.__getitem__) == document["answer"]
    assert results["weaving_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))


def test_generated_answers_equal_those_in_process(evaluated, llm):
    for document, sample in zip(DOCUMENTS, evaluated[0]["weaving_words"]):
        params = SamplingParams(max_tokens=12, temperature=0, stop=("\n",))
        assert sample["resps"][0][0] == llm.generate(f"Q: {document['question']}\nA:", params).text
