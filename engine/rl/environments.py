"""Environments: answers that are answered, over several turns, until there is a reward.

    class Guess:
        def reset(self, row):                 # a prompt's row → a text to continue, or messages
            self.secret = row["secret"]
            return [{"role": "user", "content": "Guess my number."}]

        def step(self, answer):               # what the model wrote → what it reads next, or its reward
            if answer == self.secret:
                return 1.0
            return {"role": "tool", "content": "higher" if answer < self.secret else "lower"}

Every sample plays in an object of its own. Only what the model wrote is learned; what the environment says has no
weight. Tokens are never made twice: a turn's are those that were sampled, and what follows is what the chat template
puts behind the answer. Pages of the conversation so far stay in the prefix cache.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ...tokenizer.chat import Fence, encode_rendered
from ..errors import InputError
from ..serving.llm import LLM
from ..serving.outputs import Output
from ..serving.sampling_params import SamplingParams
from .config import RLConfig
from .prompts import Prompts, encode_prompt, sample_seed
from .rewards import RewardError, call, number
from .rollouts import Rollouts, Sample, set_advantages


class Environment(Protocol):
    """Environment: the other side of a conversation."""

    def reset(self, row: dict[str, Any]) -> str | list[dict]:
        """Begin with a row of the prompts: the text to continue, or the messages to answer."""

    def step(self, answer: str) -> str | dict | list[dict] | float:
        """Answer the model: its next message (a text is a user's message, where there are messages), or its reward."""


class Game:
    """A conversation of one sample with its environment."""

    def __init__(self, llm: LLM, environment: Environment, row: dict[str, Any], seconds: float) -> None:
        self.llm, self.environment, self.seconds = llm, environment, seconds
        begun = call(environment.reset, (row,), {}, seconds, {"prompt": row.get("prompt", ""), "completion": ""})
        self.messages = None if isinstance(begun, str) and not llm.tokenizer.chat_template else _messages(begun)
        self.tokens = encode_prompt(llm, begun if self.messages is None else self.messages)
        self.prompt = begun if isinstance(begun, str) else str(begun[-1].get("content"))
        self.begin = len(self.tokens)
        self.sampled: list[int] = []
        self.logprobs: list[float] = []
        self.ended, self.reward = True, None

    def take(self, output: Output) -> None:
        """An answer, and what the environment says to it."""
        first = len(self.tokens)
        self.tokens += output.token_ids
        self.sampled += range(first, len(self.tokens))
        self.logprobs += [entry.logprob for entry in output.logprobs]
        self.ended = self.ended and output.finish_reason == "stop"
        shown = {"prompt": self.prompt, "completion": self.text}
        said = call(self.environment.step, (output.text,), {}, self.seconds, shown)
        if isinstance(said, (str, dict, list)):
            self._read(output.text, said)
        else:
            self.reward = number(said, self.environment.step, shown)

    def _read(self, answer: str, said: str | dict | list[dict]) -> None:
        if self.messages is None:
            if not isinstance(said, str):
                raise RewardError(f"an environment that began with a text went on with {said!r}: give a text")
            self.tokens += self.llm.tokenizer.encode(said)
        else:
            new = _messages(said)
            ids = continuation(self.llm.tokenizer, self.messages, answer, new)
            self.tokens += ids[1:] if ids[:1] == self.tokens[-1:] else ids  # the end of the turn was sampled
            self.messages = [*self.messages, {"role": "assistant", "content": answer}, *new]
        if len(self.tokens) >= self.llm.max_seq_len:  # no room to answer: it ends without a reward
            del self.tokens[self.sampled[-1] + 1 :]
            self.ended, self.reward = False, 0.0

    @property
    def text(self) -> str:
        """The conversation after the prompt."""
        return self.llm.tokenizer.decode(self.tokens[self.begin :])

    def sample(self) -> Sample:
        """The conversation as a sample; one that never came to its end is worth nothing."""
        del self.tokens[self.sampled[-1] + 1 :]
        done = self.reward is not None
        reward = self.reward if done else 0.0
        return Sample(
            self.prompt, self.text, self.tokens, self.sampled, self.logprobs, self.ended and done, float(reward)
        )


def _messages(said: str | dict | list[dict]) -> list[dict]:
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    return [said] if isinstance(said, dict) else list(said)


def continuation(tokenizer: Any, messages: list[dict], answer: str, new: list[dict]) -> list[int]:
    """The ids that a chat template puts behind an answer: its end mark, new messages, the head of the next answer."""
    nonce = secrets.token_hex(8)
    fence = Fence(tokenizer.special.ids.keys() - tokenizer.special.plain)
    whole = fence.around([*messages, {"role": "assistant", "content": (answer.strip() or "…") + nonce}, *new])
    before, found, behind = tokenizer.apply_chat_template(whole, add_generation_prompt=True).partition(nonce)
    if not found or nonce in behind:
        raise InputError("the chat template does not show an answer once, so a conversation over turns cannot be held")
    text = before + behind
    pieces = encode_rendered(tokenizer, fence, text, [(len(before), len(text))])
    return [token for ids, is_behind in pieces if is_behind for token in ids]


def play(
    llm: LLM, make: Callable[[], Environment], prompts: Prompts, numbers: Iterable[int], step: int, config: RLConfig
) -> Rollouts:
    """Let a group of samples play for each of these prompts, all of them a turn at a time."""
    names = [(each, index) for each in numbers for index in range(config.group)]
    games = [Game(llm, make(), prompts.row(each), config.reward_seconds) for each, _ in names]
    for _ in range(config.turns):
        playing = [(game, name) for game, name in zip(games, names) if game.reward is None]
        if not playing:
            break
        params = [
            SamplingParams(config.max_tokens, seed=sample_seed(config.seed, step, *name), logprobs=0)
            for _, name in playing
        ]
        for (game, _), output in zip(playing, llm.generate([game.tokens for game, _ in playing], params)):
            game.take(output)
    samples = [game.sample() for game in games]
    for start in range(0, len(samples), config.group):
        set_advantages(samples[start : start + config.group], config.normalize)
    return Rollouts(samples)
