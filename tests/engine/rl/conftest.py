import pytest
import torch

from tests.processes import run_processes
from warploom.engine import ModelConfig, Transformer
from warploom.engine.formats.model_writer import save_model
from warploom.engine.rl import RLConfig
from warploom.engine.training import Callback
from warploom.tokenizer import CharTokenizer

CHARACTERS = "0123456789+=<>, abcdefghijklmnopqrstuvwxyz:()[]{}-"
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "max_seq_len": 96}
REWARDS = """
import time

def digits(completion, **_):
    return sum(c.isdigit() for c in completion) / 10

def by_batch(completion, answer):
    return [float(text[:1] == right) for text, right in zip(completion, answer)]

by_batch.batch = True

def fails(completion):
    return 1 / 0

def not_a_number(completion):
    return float("nan")

def hangs(completion):
    while True:
        try:
            time.sleep(1)
        except Exception:
            pass

def too_few(completion):
    return [0.0]

too_few.batch = True
"""


class Recorder(Callback):
    """Remembers what a run told."""

    def __init__(self):
        self.steps, self.notes, self.evaluations, self.samples = [], [], [], []

    def on_step(self, progress):
        self.steps.append(progress)

    def on_message(self, text):
        self.notes.append(text)

    def on_evaluation(self, step, evaluation):
        self.evaluations.append((step, evaluation))

    def on_sample(self, step, prompt, text):
        self.samples.append((prompt, text))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """Makes a model directory with random weights whose characters cover the built-in tasks."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("base")
        tokenizer = CharTokenizer.train([CHARACTERS])
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=tokenizer.vocab_size, **{**SHAPE, **changes})
        save_model(Transformer(config), folder, tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def base(make_base):
    return make_base()


@pytest.fixture(scope="session")
def rewards(tmp_path_factory):
    """A file of reward functions, good ones and bad ones."""
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def tiny(base, rewards, tmp_path):
    """An RLConfig of a run that takes a second; random weights get different rewards for their digits."""

    def make(out="run", **changes):
        settings = {
            "data": "tasks:sums:3", "init_from": str(base), "out": str(tmp_path / out), "steps": 4, "batch_size": 4,
            "group": 4, "max_tokens": 12, "lr": 1e-3, "reward": (f"{rewards}:digits",), "device": "cpu",
            "eval_problems": 0, "save_every": 2,
        }  # fmt: skip
        return RLConfig(**{**settings, **changes})

    return make


@pytest.fixture
def processes(monkeypatch):
    """Runs `main(rank, …)` in a few processes; returns how they ended."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return run_processes
