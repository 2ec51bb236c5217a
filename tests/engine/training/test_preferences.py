"""Preference tuning: TRL's loss on the same pairs, one loss however a step is cut, exact resume, bad pairs."""

import json
import random

import numpy as np
import pytest
import torch

from tests.engine.training.conftest import save_chat_model, write_rows
from tests.processes import kill
from warploom.bench.kills import digest, processes, run_once
from warploom.engine.data.conversations import to_pair
from warploom.engine.errors import InputError
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.training import train
from warploom.engine.training.preferences import pair_losses, preference_losses
from warploom.engine.training.trainer import Trainer

TEMPLATE = (  # an answer ends with its end mark, as TRL's completion does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model with a chat template, and pairs: a right sum is chosen, a wrong one rejected."""
    folder, draw, rows = tmp_path_factory.mktemp("base"), random.Random(0), []
    for _ in range(120):
        a, b = draw.randrange(30), draw.randrange(30)
        asked = [{"role": "user", "content": f"{a} and {b}?"}]
        answers = f"That makes {a + b}.", f"Perhaps {a + b + draw.randrange(1, 9)}, who knows."
        sides = ([{"role": "assistant", "content": answer}] for answer in answers)
        rows.append({"prompt": asked, **dict(zip(("chosen", "rejected"), sides))})
    write_rows(folder / "pairs.jsonl", rows)
    save_chat_model(folder, ["That makes 12. Perhaps 7, who knows."], 280, TEMPLATE)
    return folder


@pytest.fixture
def tune(tiny, base):
    """A TrainConfig of a run on pairs."""

    def make(out="run", **changes):
        settings = {"data": str(base / "pairs.jsonl"), "init_from": str(base), "tokenizer": "bpe", "model": None}
        return tiny(out, **{**settings, "loss": "dpo", "lr": 1e-3, "sample_tokens": 0, **changes})

    return make


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_preference_loss_and_gradient_equal_trl(base, tune, tmp_path, kind):
    """Of a model that has moved away from its reference."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    trainer = Trainer(tune(batch_size=8, splits=(1.0,), loss=kind, beta=0.3), [])
    batch, ours = trainer.loader.batch(0), trainer.state.model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(ours, tmp_path / "moved", trainer.state.inputs.tokenizer)
    loss = preference_losses(ours, batch).total
    loss.backward()

    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    numbers = [trainer.loader.pairs[row] for row in trainer.loader.row_numbers(0)]
    open_model = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (open_model(path, dtype=torch.float32) for path in (tmp_path / "moved", base))
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    theirs_tokenizer.pad_token = theirs_tokenizer.eos_token = "<|im_end|>"
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to=[],
        max_steps=1, gradient_checkpointing=False, beta=0.3, loss_type={"dpo": "sigmoid", "ipo": "ipo"}[kind],
    )  # fmt: skip
    dpo = trl.DPOTrainer(
        model=policy, ref_model=reference, args=arguments, processing_class=theirs_tokenizer,
        train_dataset=datasets.Dataset.from_list([rows[number] for number in numbers]),
    )  # fmt: skip
    padded = next(iter(dpo.get_train_dataloader()))
    assert int(padded["completion_mask"].sum()) == int((batch.targets_BT != -100).sum())
    theirs = dpo.compute_loss(policy.eval(), dict(padded))
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), abs=5e-6)
    expected, found = policy.model.embed_tokens.weight.grad, ours.embedding.weight.grad
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)


def test_preference_tuning_learns_pairs(tune, recorder):
    """The first loss is that of no opinion, log 2; held-out pairs are told apart at the end."""
    result = train(tune(steps=40, eval_every=20, eval_batches=0), [recorder])
    assert recorder.losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert result.evaluation.accuracy == 1.0 and result.evaluation.margin > 1
    assert "accuracy 1.000" in str(result.evaluation) and result.val_loss < recorder.losses[0]


def test_preference_loss_in_micro_batches_is_the_same(tune, recorders):
    curves = []
    for parts in (1, 4):
        recorder = recorders()
        train(tune(f"parts{parts}", grad_accum_steps=parts), [recorder])
        curves.append(recorder.losses)
    assert curves[0] == pytest.approx(curves[1], abs=5e-6) and curves[0][-1] < curves[0][0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lora", [None, 4])
def test_preference_run_killed_ends_with_same_bits(tune, monkeypatch, lora):
    """The reference stays the model before the first step, whatever has been learned since."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = tune("whole", steps=24, save_every=3, eval_every=9, lora=lora)
    run_once(processes(), whole)
    assert digest(kill(processes(), whole, 2)) == digest(whole)


def test_pair_losses_at_known_margins():
    margins = torch.tensor([0.0, 2.0, -2.0])
    assert pair_losses(margins, "dpo", 0.5).tolist() == pytest.approx([0.693147, 0.313262, 1.313262], abs=1e-6)
    assert pair_losses(margins, "ipo", 0.5).tolist() == [1.0, 1.0, 9.0]


def test_prompt_of_a_pair_may_be_implicit():
    asked, yes, no = (
        {"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "y"), ("assistant", "n"))
    )
    sides = to_pair({"chosen": [asked, yes], "rejected": [asked, no]}, "x:1")
    given = to_pair({"prompt": "?", "chosen": "y", "rejected": "n"}, "x:1")
    assert [side.messages for side in sides] == [side.messages for side in given]
    assert [message.get("weight", 1) for message in sides[1].messages] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "row", "said"),
    [
        ({}, {"chosen": "a", "rejected": "b"}, "chosen and rejected have no common prompt: give a prompt"),
        ({}, {"prompt": "q", "chosen": "a", "rejected": ""}, "is no preference pair: it needs chosen and rejected"),
        ({"loss": "cross_entropy"}, None, "holds preference pairs: give loss dpo or ipo"),
        ({"init_from": None}, None, "loss=dpo needs init_from"),
        ({"context": 8}, None, "no preference pair fits a context of 8 tokens"),
    ],
)
def test_pairs_that_cannot_work_are_one_sentence(tune, tmp_path, changes, row, said):
    if row:
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(row) + "\n")
        changes = {"data": str(path)}
    with pytest.raises(InputError, match=said):
        train(tune(**changes))


def test_dpo_of_text_is_refused(tune, story):
    with pytest.raises(InputError, match="holds no preference pairs"):
        train(tune(data=str(story)))


def test_tuned_model_opens(tune):
    model, tokenizer = load_model(train(tune(steps=2)).directory)
    assert tokenizer.chat_template == TEMPLATE and model.config.d_model == 32
