"""Chat datasets: JSON lines of conversations to token files with a loss mask.

One format is read, `{"messages": [{"role": …, "content": …}], "tools": […]}`; three others become it by renaming keys:

    ShareGPT            {"conversations": [{"from": "human" | "gpt", "value": …}]}
    Alpaca              {"instruction": …, "input": …, "output": …}
    prompt, completion  {"prompt": …, "completion": …}, strings or lists of messages; the prompt is masked in the loss

Preference pairs are `{"prompt": …, "chosen": …, "rejected": …}`, strings or messages; without a prompt it is the
messages that both begin with. A pair becomes two documents of one split, the chosen answer first.

A conversation is one document of the token files; `train.learn` is its loss mask, a byte a token. The split of a
conversation is decided as for texts: by its hash, or where there are few, by its place in the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...tokenizer.assistant_mask import encode_conversation
from ...tokenizer.chat import render
from ..errors import InputError
from .corpus import FEW
from .sources import expand
from .text_files import FORMS, holds_rows, read_rows
from .tokens import SPLITS, Meta, SplitWriter, TokenData, directory_for, file_hash, split_edges

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}  # of ShareGPT
RESERVED = ("messages", "tools", "add_generation_prompt")  # template variables that the row's own keys or training set
SHOWN = 300  # characters of a row that an error shows


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation: its messages, the line of the file it is from, and template variables (tools, a row's
    `chat_template_kwargs`)."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    line: str


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations of some files; can be iterated any number of times."""

    paths: list[Path]
    pairs: bool = False
    """Are these preference pairs?"""

    @property
    def name(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def read(self) -> Iterator[tuple[Conversation, ...]]:
        """Yield the conversation of every line in order; of a preference pair, both."""
        for path in self.paths:
            for line, row in read_rows(path):
                yield to_pair(row, line) if self.pairs else (to_conversation(row, line),)

    def texts(self) -> Iterator[str]:
        """Rendered text to train a tokenizer on, of all splits: the training split is nearly all of it."""
        return (render(None, conversation.messages, {}) for each in self.read() for conversation in each)


def open_conversations(pattern: str | Path) -> Conversations | None:
    """Open the conversations of a file, folder or glob; None if its first row is not one."""
    paths = expand([pattern])
    if not holds_rows(paths[0]):
        return None
    row = next((row for _, row in read_rows(paths[0])), None)
    if not isinstance(row, Mapping):
        return None
    pairs = "chosen" in row and "rejected" in row
    return Conversations(paths, pairs) if pairs or _form(row) else None


def to_conversation(row: Any, line: str) -> Conversation:
    """Convert a row in any of the four formats to a `Conversation`; `line` names it in errors."""
    form = _form(row) if isinstance(row, Mapping) else None
    if form is None:
        raise InputError(f"{line} is no conversation: it needs {FORMS}, or chosen and rejected: {_show(row)}")
    try:
        messages, tools = form(row), row.get("tools") or None
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (TypeError, ValueError) as error:
        raise InputError(f"{line} is no conversation: {error}: {_show(row)}") from error
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping) or variables.keys() & RESERVED:
        reserved = ", ".join(RESERVED)
        raise InputError(f"{line}: chat_template_kwargs must be an object without {reserved}: {_show(variables)}")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(f"{line}: messages must be a list of objects with a role and a content: {_show(row)}")
    return Conversation(messages, {**variables, **({"tools": tools} if tools else {})}, line)


def to_pair(row: Any, line: str) -> tuple[Conversation, Conversation]:
    """Convert a row to a preference pair: the conversations that end in the chosen and in the rejected answer."""
    sides: list[Any] = [row.get(name) for name in ("chosen", "rejected")] if isinstance(row, Mapping) else [None]
    if not all(sides):
        raise InputError(f"{line} is no preference pair: it needs chosen and rejected: {_show(row)}")
    prompt = row.get("prompt")
    if not prompt and all(isinstance(side, list) for side in sides):
        shared = len(list(itertools.takewhile(lambda both: both[0] == both[1], zip(*sides))))
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not prompt or not all(sides):
        raise InputError(f"{line}: chosen and rejected have no common prompt: give a prompt: {_show(row)}")
    chosen, rejected = ({**row, "prompt": prompt, "completion": side} for side in sides)
    return to_conversation(chosen, line), to_conversation(rejected, line)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _form(row: Mapping) -> Callable[[Mapping], list[dict]] | None:
    return next((form for keys, form in FORMS_BY_KEYS.items() if all(row.get(key) for key in keys)), None)


def _sharegpt(row: Mapping) -> list[Any]:
    return [
        {**turn, "role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, Mapping) and "from" in turn
        else turn
        for turn in row["conversations"]
    ]


def _alpaca(row: Mapping) -> list[dict]:
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _completion(row: Mapping) -> list[dict]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*({**message, "weight": 0} for message in prompt), *completion]


FORMS_BY_KEYS = {
    ("messages",): lambda row: row["messages"],
    ("conversations",): _sharegpt,
    ("instruction", "output"): _alpaca,
    ("prompt", "completion"): _completion,
}


def write_conversations(
    conversations: Conversations,
    tokenizer: Any,
    out: str | Path,
    splits: tuple[float, ...],
    on_progress: Callable[[int], None] | None = None,
) -> TokenData:
    """Tokenize conversations into `out`/{train,val,test}.bin, with loss masks in `.learn`. `on_progress` is called with
    the number of bytes encoded so far."""
    edges, out, done = split_edges(splits), Path(out), 0
    count = sum(1 for _ in itertools.islice(conversations.read(), FEW))
    if not count:
        raise InputError(f"{conversations.name} holds no conversation")
    with directory_for(out) as scratch:
        tokenizer.save(scratch)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        writers = [SplitWriter(scratch / name, dtype, None, learn=True) for name in SPLITS]
        for number, documents in enumerate(conversations.read()):
            place = (number + 0.5) / count if count < FEW else place_of(documents[0].messages)
            writer = writers[int(np.searchsorted(edges, place, side="right"))]
            for conversation in documents:
                ids, learned = _encode(conversation, tokenizer)
                size = len(tokenizer.decode(ids).encode("utf-8", "surrogatepass"))
                writer.add(ids, True, size, learned)
                done += size
            if on_progress:
                on_progress(done)
        meta = Meta(
            source=conversations.name,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            end_of_document=None,
            tokenizer_sha256=file_hash(scratch / "tokenizer.json"),
            splits={name: writer.close() for name, writer in zip(SPLITS, writers)},
            pairs=conversations.pairs,
        )
        (scratch / "meta.json").write_text(json.dumps(asdict(meta), indent=2))
    return TokenData(out)


def _encode(conversation: Conversation, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        ids, learned = encode_conversation(tokenizer, conversation.messages, **conversation.variables)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever a foreign row may hold
        raise InputError(f"{conversation.line}: {error}: {_show(conversation.messages)}") from error
    return np.array(ids, np.uint32), np.array(learned, np.uint8)


def place_of(messages: list[dict[str, Any]]) -> float:
    """Hash a conversation to [0, 1), which decides its split."""
    text = json.dumps(messages, sort_keys=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _show(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
