"""Chat dataset that needs no download at run time: the PyPI package `chitchat-dataset`.

7,168 chats of strangers, 258,145 messages, from the Chit-Chat Challenge of the PCC lab at Brigham Young University (MIT
license, 8 MB). Their first speaker becomes the user, the second the assistant. Nothing of the package is imported but
its data.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

PACKAGE = "chitchat_dataset"
ROLES = ("user", "assistant")


def chitchat() -> Iterator[list[dict[str, str]]]:
    """Conversations in which both sides speak, as lists of messages; the last one is the assistant's."""
    found = importlib.util.find_spec(PACKAGE)
    path = Path(found.origin).parent / "dataset.json" if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise InputError(
            "the conversations are in the package chitchat-dataset (8 MB, MIT license), which is not installed: "
            "pip install 'warploom[chat]'"
        )
    for conversation in json.loads(path.read_text(encoding="utf-8")).values():
        turns = [" ".join(said["text"].strip() for said in turn).strip() for turn in conversation["messages"]]
        turns = [turn for turn in turns if turn]
        turns = turns[: len(turns) // 2 * 2]
        if turns:
            yield [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(turns)]
