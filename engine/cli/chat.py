"""`warploom chat`: talk to a model in the terminal.

    warploom chat MODEL
    echo "What is a loom?" | warploom chat MODEL

The conversation is formatted by the model's own chat template, or a plain one. When it outgrows the context, the model
no longer sees the oldest exchanges; it always sees the system prompt, and /save writes everything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...tokenizer.sources import write_text
from ..errors import InputError
from ..serving.outputs import EngineError
from ..serving.sampling_params import SamplingParams
from .flags import parse
from .model_argument import ModelOptions, model_first

HELP = """\
/temp V     temperature: 0 is always the most likely token
/topk V     only the V most likely tokens; 0 for all
/topp V     only the most likely tokens that reach this probability together
/tokens V   most tokens of an answer
/system T   what the model is told before everything; empty to remove it
/save F     write the conversation to a JSON file
/reset      forget the conversation
/help       this list
quit, exit  leave"""


@dataclass(frozen=True)
class ChatOptions:
    """Talk to a model in the terminal."""

    llm: ModelOptions
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256, temperature=0.8))
    system: str = ""
    """System message."""
    prompt: str | None = None
    """Send this one message, print the answer, and exit."""


def run(argv: list[str]) -> int:
    """Entry point of `warploom chat`."""
    options = parse(ChatOptions, model_first(argv), "chat")
    chat = Chat(options.llm.open(), options.sampling, options.system)
    chat.llm.engine.start()  # in its own thread, where Ctrl-C does not break a step
    if options.prompt is not None:
        return chat.say(options.prompt)
    if sys.stdin.isatty():
        print(f"{options.llm.model}: say something, or /help")
    return chat.loop()


class Chat:
    """Chat session: messages, sampling parameters, and the slash commands that change them."""

    def __init__(self, llm, params: SamplingParams, system: str = ""):
        self.llm, self.params, self.system = llm, params, system
        self.messages: list[dict[str, str]] = []
        self._forgetful = False
        self._commands: dict[str, Callable[[str], str]] = {
            "/temp": lambda text: self._set("temperature", float, text),
            "/topk": lambda text: self._set("top_k", int, text),
            "/topp": lambda text: self._set("top_p", float, text),
            "/tokens": lambda text: self._set("max_tokens", int, text),
            "/system": self._set_system,
            "/save": self._save,
            "/reset": lambda _: self._reset(),
            "/help": lambda _: HELP,
        }

    def loop(self) -> int:
        """Read lines until end of input, "quit" or "exit"."""
        for line in _lines():
            line = line.strip()
            if line.removeprefix("/") in ("quit", "exit"):
                return 0
            if line.startswith("/"):
                print(self.command(line))
            elif line:
                self.say(line)
        return 0

    def command(self, line: str) -> str:
        """Run a slash command; return its output."""
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            return f"{name} is not a command; /help lists them"
        try:
            return self._commands[name](rest.strip())
        except InputError as error:
            return str(error)

    def say(self, text: str) -> int:
        """Send a message and stream the answer; Ctrl-C stops it."""
        self.messages.append({"role": "user", "content": text})
        answer, status = "", 0
        try:
            for piece in self.llm.stream(self.prompt(), self.params):
                answer += piece.text
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            status = 130
        except (InputError, EngineError) as error:
            self.messages.pop()
            print(f"chat: {error}", file=sys.stderr)
            return 2
        print()
        self.messages.append({"role": "assistant", "content": answer})
        return status

    def prompt(self) -> list[int]:
        """Tokenize the conversation, dropping the oldest exchanges if they no longer fit beside the answer."""
        context = self.llm.max_seq_len
        room = context - min(self.params.max_tokens or 1, context // 2)
        first = 0
        while len(tokens := self.llm.encode_chat(self._messages(first))) > room and first + 2 < len(self.messages):
            first += 2  # a question and its answer
        if first and not self._forgetful:
            print("(the oldest messages no longer fit into the model's context)", file=sys.stderr)
        self._forgetful = first > 0
        return tokens

    def _messages(self, first: int = 0) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages[first:]

    def _set(self, name: str, kind: Callable, text: str) -> str:
        try:
            value = kind(text)
        except ValueError:
            raise InputError(f"{name} needs a number, got {text!r}") from None
        self.params = dataclasses.replace(self.params, **{name: value})
        return f"{name} is {value}"

    def _set_system(self, text: str) -> str:
        self.system = text
        return "the system prompt is set" if text else "there is no system prompt"

    def _save(self, name: str) -> str:
        if not name:
            return "/save needs a file name"
        path = Path(name)
        try:
            write_text(path, json.dumps(self._messages(), ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot save to {path}: {error.strerror or error}") from None
        return f"saved {len(self.messages)} messages to {path}"

    def _reset(self) -> str:
        self.messages.clear()
        return "the conversation is forgotten"


def _lines() -> Iterator[str]:
    """Yield lines from a terminal, with prompt and history, or from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
