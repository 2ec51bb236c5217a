import json
import random

import pytest
import torch

from tests.processes import run_processes
from warploom.engine import ModelConfig, Transformer
from warploom.engine.formats.model_writer import save_model
from warploom.engine.training import Callback, TrainConfig
from warploom.tokenizer import BPETokenizer

TINY = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32}


def save_chat_model(folder, texts, vocab_size, template):
    """A small model with a ChatML-like template, in `folder`."""
    tok = BPETokenizer.train(texts, vocab_size, special_tokens=("<|im_start|>", "<|im_end|>"))
    tok.chat_template = template
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig(**{**TINY, "max_seq_len": 128}, vocab_size=tok.vocab_size)), folder, tok)


def write_rows(path, rows):
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Recorder(Callback):
    """Remembers what a run told."""

    def __init__(self):
        self.steps, self.evaluations, self.samples, self.notes, self.done = [], [], [], [], 0

    def on_step(self, progress):
        self.steps.append(progress)

    def on_evaluation(self, step, evaluation):
        self.evaluations.append((step, evaluation))

    def on_sample(self, step, prompt, text):
        self.samples.append((step, prompt, text))

    def on_message(self, text):
        self.notes.append(text)

    def on_end(self):
        self.done += 1

    @property
    def losses(self):
        return [progress.loss for progress in self.steps]


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """A text with structure to learn: sums."""
    draw = random.Random(0)
    lines = (f"{a} and {b} make {a + b}.\n" for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(900)))
    path = tmp_path_factory.mktemp("story") / "sums.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def tiny(story, tmp_path):
    """A TrainConfig of a run that takes a second."""

    def make(out="run", **changes):
        settings = {
            "data": str(story), "out": str(tmp_path / out), "model": TINY, "tokenizer": "char", "steps": 12,
            "batch_size": 4, "eval_every": 6, "eval_batches": 2, "save_every": 5, "sample_tokens": 4,
            "dtype": "float32", "device": "cpu", "log_every": 1,
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def recorders():
    return Recorder


@pytest.fixture
def processes(monkeypatch):
    """Runs `main(rank, …)` in a few processes; returns how they ended."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return run_processes
