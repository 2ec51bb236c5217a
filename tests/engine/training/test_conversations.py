"""Instruction tuning: TRL's loss on the same conversations, one loss however a step is cut, and bit-exact resume."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.training import member
from tests.engine.training.conftest import save_chat_model, write_rows
from tests.processes import kill
from warploom.bench.kills import digest, run_once
from warploom.bench.kills import processes as commands
from warploom.engine.cli import main
from warploom.engine.errors import InputError
from warploom.engine.formats.families import weight_map
from warploom.engine.formats.model_directory import load_model
from warploom.engine.training import train
from warploom.engine.training.callbacks import JsonLog
from warploom.engine.training.trainer import Trainer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNTAGGED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model with a chat template that has no tags, and conversations about sums."""
    folder, draw = tmp_path_factory.mktemp("base"), random.Random(0)
    rows = []
    for _ in range(160):
        a, b, c = (draw.randrange(30) for _ in range(3))
        said = [f"{a} and {b}?", f"That makes {a + b}.", f"and {c} more?", f"{a + b + c}."][: draw.choice((2, 4))]
        roles = ("user", "assistant") * 2
        rows.append({"messages": [{"role": role, "content": text} for role, text in zip(roles, said)]})
    write_rows(folder / "chats.jsonl", rows)
    save_chat_model(folder, [row["messages"][1]["content"] for row in rows], 300, UNTAGGED)
    return folder


@pytest.fixture
def chat(tiny, base):
    """A TrainConfig of a run on conversations."""

    def make(out="run", **changes):
        settings = {"data": str(base / "chats.jsonl"), "init_from": str(base), "tokenizer": "bpe", "model": None}
        return tiny(out, **{**settings, **changes})

    return make


def test_conversation_sample_answers_first_question(base, chat):
    """The sample of a run is the answer to the first held-out conversation, which ends where a turn does."""
    result = train(chat(steps=1, sample_tokens=6))
    sample = json.loads((result.directory / "run.json").read_text())["samples"][-1]
    assert re.fullmatch(r"<\|im_start\|>user\n\d+ and \d+\?<\|im_end\|>\n?<\|im_start\|>assistant\n", sample["prompt"])


def test_eval_of_conversations_counts_answers(base, chat, capsys):
    """The file that training reads can be evaluated: the loss of what the assistant says, as training measures it."""
    rows = (base / "chats.jsonl").read_text().splitlines(keepends=True)
    some = base / "some.jsonl"
    some.write_text("".join(rows[:20]))
    result = train(chat(data=str(some), splits=(0.5, 0.5), steps=1, eval_batches=0, sample_tokens=0))
    (base / "held.jsonl").write_text("".join(rows[10:20]))
    assert main(["eval", str(result.directory), str(base / "held.jsonl"), "--device", "cpu", "--dtype", "float32"]) == 0
    assert f"loss {result.val_loss:.4f}" in capsys.readouterr().out


def test_conversation_loss_and_gradients_equal_trl(base, chat, tmp_path):
    """Packed with borders and masked without tags; TRL pads, and needs its tags."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    trainer = Trainer(chat(batch_size=8, splits=(1.0,)), [])
    split, loader, batch = trainer.state.train_split, trainer.loader, trainer.loader.batch(0)
    ours, _ = trainer.accumulate(batch)
    rows = [json.loads(line) for line in (base / "chats.jsonl").read_text().splitlines()]
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    theirs_tokenizer.chat_template = CHATML
    theirs_tokenizer.pad_token = "<|im_end|>"
    starts = [at for number in loader.row_numbers(0) for at, _ in loader.packed[number]]
    used = [int(split.starts.searchsorted(at)) for at in starts]
    theirs_model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(used), max_length=128, use_cpu=True,
        bf16=False, report_to=[], max_steps=1, gradient_checkpointing=False, assistant_only_loss=True,
    )  # fmt: skip
    sft = trl.SFTTrainer(
        model=theirs_model, args=arguments, processing_class=theirs_tokenizer,
        train_dataset=datasets.Dataset.from_list([rows[number] for number in used]),
    )  # fmt: skip
    padded = next(iter(sft.get_train_dataloader()))
    assert int((padded["labels"] != -100).sum()) == int((batch.targets_BT != -100).sum())
    theirs = sft.compute_loss(theirs_model.train(), dict(padded))
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs.detach()), rel=2e-6)
    gradients = dict(theirs_model.named_parameters())
    for name, p in trainer.state.masters.named.items():
        for published, grad in weight_map(trainer.state.model.config, [name])[0].split(p.grad):
            wanted = gradients[published].grad
            assert (grad - wanted).norm() <= 5e-6 * wanted.norm(), published


def test_conversation_loss_is_per_target(chat, recorders):
    """The same curve in one piece and in four micro-batches, whose numbers of targets differ."""
    curves = []
    for parts in (1, 4):
        recorder = recorders()
        train(chat(f"parts{parts}", grad_accum_steps=parts), [recorder])
        curves.append(recorder.losses)
    assert curves[0] == pytest.approx(curves[1], rel=2e-6)


@pytest.mark.parametrize("grid", [{"dp": 2}, {"fsdp": 2}], ids=["dp", "fsdp"])
def test_conversation_loss_is_per_target_of_all_processes(chat, processes, grid):
    """Processes whose rows hold more and fewer targets: the curve of one process."""
    one = chat("one", steps=8, grad_accum_steps=2, log_every=1)
    train(one)
    two, store = (
        dataclasses.replace(one, out=one.out.replace("one", "two"), **grid),
        torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    )
    assert processes(member.main, 2, size=2, port=store.port, config=two) == [0, 0]
    curves = [
        [line["loss"] for line in JsonLog.read(Path(config.out) / "log.jsonl") if "loss" in line]
        for config in (one, two)
    ]
    assert len(curves[0]) == 8 and curves[1] == pytest.approx(curves[0], rel=2e-6)


def test_windows_without_a_target_do_not_stop_a_run(chat, recorder):
    train(chat(order="random", context=4, batch_size=2, steps=30), [recorder])
    assert 0.0 in recorder.losses and recorder.steps[-1].bad_steps == 0


def test_conversation_epochs_keep_best_by_validation(chat, recorder):
    result = train(chat(steps=None, epochs=3, lr=5e-3, eval_every=5, eval_batches=0), [recorder])
    assert result.steps == 3 * len(Trainer(chat("count"), []).loader)
    assert result.val_loss == min(found.loss for _, found in recorder.evaluations) < recorder.losses[0]
    assert load_model(result.directory)[1].chat_template == UNTAGGED


@pytest.mark.timeout(300)
def test_conversation_run_killed_ends_with_same_bits(chat, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = chat("whole", steps=24, save_every=3, eval_every=9)
    run_once(commands(), whole)
    assert digest(kill(commands(), whole, 3)) == digest(whole)


def test_other_masks_are_other_training_data(chat, base, tmp_path):
    """A run does not go on with another mask of the same tokens."""
    whole = chat(steps=2)
    train(whole)
    path = tmp_path / "run" / "data" / "meta.json"
    meta = json.loads(path.read_text())
    assert meta["splits"]["train"]["learned"] < meta["splits"]["train"]["tokens"] / 2
    meta["splits"]["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match="other training data"):
        train(dataclasses.replace(whole, resume=True, steps=4))


def test_inspect_data_shows_what_is_learned(chat, capsys):
    config = chat(steps=1)
    train(config)
    assert main(["inspect", "data", config.out, "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "document 1: " in said and "⟦That makes " in said and "<|im_end|>⟧" in said
    assert load_file(f"{config.out}/model.safetensors")


def test_task_is_a_conversation_for_a_chat_model(chat, capsys):
    """Its problems are learned as `rl` and `eval` ask them: in the template of the model."""
    config = chat(data="tasks:sums:3", steps=1)
    train(config)
    assert main(["inspect", "data", config.out, "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"user\n\d\+\d\+\d=<\|im_end\|>\n?<\|im_start\|>assistant\n⟦(<\d+>)?\d<\|im_end\|>⟧", said)
