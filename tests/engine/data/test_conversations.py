"""Conversations of every form become the same tokens, and what is learned survives every loader."""

import gzip
import json

import numpy as np
import pytest

from warploom.engine.data import open_loader
from warploom.engine.data.conversations import open_conversations, write_conversations
from warploom.engine.data.hf_datasets import fetch_rows, is_hub_id
from warploom.engine.data.loader import IGNORE
from warploom.engine.errors import InputError
from warploom.engine.training.evaluate import validation_batches
from warploom.tokenizer import CharTokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
FORMS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "yes"},
    "strings": {"prompt": "hi", "completion": "yes"},
    "lists": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}


@pytest.fixture(scope="module")
def tok():
    tok = CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz:\n 0123456789"])
    tok.chat_template = TEMPLATE
    return tok


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens(path, tok, out, splits=(1.0,)):
    return write_conversations(open_conversations(path), tok, out, splits)


@pytest.fixture
def talks(tmp_path, tok):
    """Three hundred conversations of two turns, and their tokens."""
    turn = lambda i: [{"role": "user", "content": f"{i} " * (i % 5)}, {"role": "assistant", "content": f"said {i}"}]  # noqa: E731
    path = write(tmp_path / "talks.jsonl", ({"messages": turn(i) + turn(i + 1)} for i in range(300)))
    return tokens(path, tok, tmp_path / "tokens", (0.8, 0.2))


@pytest.mark.parametrize("form", FORMS)
def test_conversation_of_any_form_gives_the_same(tmp_path, tok, form):
    split = tokens(write(tmp_path / "one.jsonl", [FORMS[form]]), tok, tmp_path / "tokens").split("train")
    assert tok.decode(split.tokens.tolist()) == "u:hi\na:yes\n"
    assert tok.decode(split.tokens[split.learn > 0].tolist()) == "yes"


def test_conversations_are_read_from_gz_folder_and_glob(tmp_path, tok):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl.gz", [FORMS["alpaca"]])
    write(tmp_path / "in" / "b.jsonl", [FORMS["sharegpt"]] * 2)
    for pattern, count in (("in", 3), ("in/*.gz", 1), ("in/*.jsonl*", 3)):
        data = tokens(tmp_path / pattern, tok, tmp_path / "tokens")
        assert data.meta.splits["train"].documents == count


def test_prompt_assistant_turns_are_not_learned(tmp_path, tok):
    row = {"prompt": [*MESSAGES, MESSAGES[0]], "completion": "no"}
    split = tokens(write(tmp_path / "one.jsonl", [row]), tok, tmp_path / "tokens").split("train")
    assert tok.decode(split.tokens[split.learn > 0].tolist()) == "no"


def test_conversation_splits_share_no_conversation(talks):
    train, val = talks.split("train"), talks.split("val")
    documents = [
        {bytes(piece) for piece in np.split(np.asarray(split.tokens), split.starts[1:])} for split in (train, val)
    ]
    assert not documents[0] & documents[1]
    assert 0.7 < len(train.starts) / (len(train.starts) + len(val.starts)) < 0.9


@pytest.mark.parametrize("order", ["auto", "epochs", "random"])
def test_loader_targets_are_the_learned_tokens(talks, tok, order):
    split = talks.split("train")
    loader = open_loader(order, split, 4, 64, seed=1)
    targets = [loader.batch(step).targets_BT.numpy() for step in range(len(loader) + 1)]
    said = "".join(tok.decode(row[row != IGNORE].tolist()) for batch in targets for row in batch)
    assert set(said) <= set("said 0123456789")
    if order == "auto":  # packed: none is cut, so all are learned once an epoch
        counts = sum(int((loader.batch(0).rows(row, row + 1).targets_BT != IGNORE).sum()) for row in range(4))
        assert counts == int((targets[0] != IGNORE).sum())
        assert (
            sum(split.learn[at + 1 : at + n + 1].sum() for row in loader.packed for at, n in row) == split.learn.sum()
        )


def test_validation_reads_each_target_once(talks):
    """Validation of conversations reads each target once."""
    split = talks.split("val")
    batches = list(validation_batches(split, 4, 64))
    assert sum(int((batch.targets_BT != IGNORE).sum()) for batch in batches) == split.learn.sum()
    assert all(int(batch.cu_seqlens[-1]) == batch.tokens_BT.numel() for batch in batches)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "no chat"}, "line.jsonl:2 is no conversation: it needs messages, conversations"),
        ({"chosen": "a", "rejected": "b"}, "is no conversation"),
        ({"messages": MESSAGES[:1]}, r'line.jsonl:2: nothing in it is learned.*"content": "hi"'),
        ({"messages": ["hi"]}, "line.jsonl:2: messages must be a list of objects with a role"),
        ({"messages": "hi"}, "line.jsonl:2: messages must be a list"),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": ""}]},
            "message 3 is an assistant's and says nothing",
        ),
        ({"instruction": 5, "output": "x"}, "line.jsonl:2 is no conversation: "),
        (
            {"messages": MESSAGES, "chat_template_kwargs": [1]},
            "chat_template_kwargs must be an object",
        ),
        ({"messages": MESSAGES, "chat_template_kwargs": {"tools": 1}}, "must be an object without messages, tools"),
        ({"messages": MESSAGES, "tools": "{"}, "line.jsonl:2 is no conversation: Expecting"),
    ],
)
def test_conversation_row_that_is_wrong_is_shown(tmp_path, tok, row, words):
    path = write(tmp_path / "line.jsonl", [FORMS["messages"], row])
    with pytest.raises(InputError, match=words):
        tokens(path, tok, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_row_variables_reach_the_template(tmp_path, tok):
    """`chat_template_kwargs` of a row are that row's alone."""
    path = write(
        tmp_path / "two.jsonl", [{**FORMS["messages"], "chat_template_kwargs": {"mark": "x"}}, FORMS["alpaca"]]
    )
    marking = CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz:\n 0123456789"])
    marking.chat_template = "{{ mark }}" + TEMPLATE
    split = tokens(path, marking, tmp_path / "tokens").split("train")
    assert marking.decode(split.tokens.tolist()) == "xu:hi\na:yes\nu:hi\na:yes\n"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A hub with one data set, read from local files as `datasets` reads others."""
    datasets, asked = pytest.importorskip("datasets"), []
    write(tmp_path / "hub.jsonl", [{**FORMS["messages"], "score": 1}] * 3)
    load = datasets.load_dataset

    def load_dataset(path, *, split, streaming, **others):
        asked.append({"path": path, "split": split, **others})
        if path != "org/talks":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {path!r} doesn't exist on the Hub")
        return load("json", data_files=str(tmp_path / "hub.jsonl"), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_dataset_id_names_conversations(tmp_path, tok, stand_in):
    for _ in range(2):  # all rows are here the second time
        path = fetch_rows("org/talks/small:train_sft@v1", tmp_path / "keep")
    assert stand_in == [{"path": "org/talks", "name": "small", "split": "train_sft", "revision": "v1"}]
    assert tokens(path, tok, tmp_path / "tokens").meta.splits["train"].documents == 3
    with pytest.raises(InputError, match="'org/none' is no file here, and on the hub there is no data set"):
        fetch_rows("org/none", tmp_path / "keep")


@pytest.mark.parametrize("name, is_id", [("org/talks", True), ("org/talks:train", True), ("in/none.jsonl", False)])
def test_dataset_id_is_told_from_a_path(tmp_path, monkeypatch, name, is_id):
    """A folder that is here means a file in it, even one that is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    assert is_hub_id(name) is is_id


def test_text_rows_are_no_conversations(tmp_path):
    assert open_conversations(write(tmp_path / "text.jsonl", [{"text": "a"}])) is None
    (tmp_path / "novel.txt").write_text("once")
    assert open_conversations(tmp_path / "novel.txt") is None
