"""Multi-turn RL environments: the environment replies to each answer until it gives a reward.

    class Guess:
        def reset(self, row):                 # a prompt's row → a text to continue, or messages
            self.secret = row["secret"]
            return [{"role": "user", "content": "Guess my number."}]

        def step(self, answer):               # what the model wrote → what it reads next, or its reward
            if answer == self.secret:
                return 1.0
            return {"role": "tool", "content": "higher" if answer < self.secret else "lower"}

Every sample has an environment object of its own. Only tokens that the model sampled have a loss; the environment's
replies are masked. Nothing is tokenized twice: a turn keeps the sampled tokens, and after it come the tokens that the
chat template puts behind an answer. KV-cache pages of the conversation so far stay in the prefix cache.
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
    """Interface of a multi-turn environment, the other side of a conversation."""

    def reset(self, row: dict[str, Any]) -> str | list[dict]:
        """Start an episode from a prompt's row: return the text to continue, or the messages to answer."""

    def step(self, answer: str) -> str | dict | list[dict] | float:
        """Reply to an answer with the next message (a text becomes a user message), or end with a reward."""


class Episode:
    """One sample's conversation with its environment."""

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
        """Append the model's answer and the environment's reply."""
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
        """Decoded conversation after the prompt."""
        return self.llm.tokenizer.decode(self.tokens[self.begin :])

    def sample(self) -> Sample:
        """The episode as a `Sample`; an unfinished one has reward 0."""
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
    """Tokens that the chat template puts between two answers: end of turn, new messages, generation prompt."""
    nonce = secrets.token_hex(8)
    fence = Fence(tokenizer.special.ids.keys() - tokenizer.special.plain)
    whole = fence.around([*messages, {"role": "assistant", "content": (answer.strip() or "…") + nonce}, *new])
    before, found, behind = tokenizer.apply_chat_template(whole, add_generation_prompt=True).partition(nonce)
    if not found or nonce in behind:
        raise InputError("the chat template does not show an answer once, so a conversation over turns cannot be held")
    text = before + behind
    pieces = encode_rendered(tokenizer, fence, text, [(len(before), len(text))])
    return [token for ids, is_behind in pieces if is_behind for token in ids]


def roll_out_episodes(
    llm: LLM, make: Callable[[], Environment], prompts: Prompts, numbers: Iterable[int], step: int, config: RLConfig
) -> Rollouts:
    """Roll out multi-turn episodes: a group for each prompt, all of them batched turn by turn."""
    names = [(each, index) for each in numbers for index in range(config.group)]
    episodes = [Episode(llm, make(), prompts.row(each), config.reward_seconds) for each, _ in names]
    for _ in range(config.turns):
        unfinished = [(episode, name) for episode, name in zip(episodes, names) if episode.reward is None]
        if not unfinished:
            break
        params = [
            SamplingParams(config.max_tokens, seed=sample_seed(config.seed, step, *name), logprobs=0)
            for _, name in unfinished
        ]
        for (episode, _), output in zip(
            unfinished, llm.generate([episode.tokens for episode, _ in unfinished], params)
        ):
            episode.take(output)
    samples = [episode.sample() for episode in episodes]
    for start in range(0, len(samples), config.group):
        set_advantages(samples[start : start + config.group], config.normalize)
    return Rollouts(samples)
