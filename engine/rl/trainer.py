"""Reinforcement learning by group policy gradient (GRPO), exactly on-policy and resumable.

    for each step:
        prompts, a pure function of (seed, step)
        a group of samples for each, by the serving engine over the weights of now, noise keyed by (seed, step, row)
        rewards; the advantage of a sample is its reward minus the group's mean
        one gradient step on −Σ advantage · log p, and the engine serves the new weights

It is the loop of `training/trainer.py` with rollouts for batches and the policy gradient for a loss; checkpoints,
bit-exact resume, signals, logs, LoRA and data parallelism are inherited.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.tokens import file_hash
from ..device import pick_device
from ..errors import InputError
from ..formats.model_directory import load_model
from ..formats.model_info import load_config, read_tokenizer
from ..formats.model_source import resolve_model
from ..model import Transformer
from ..serving.llm import LLM
from ..training.callbacks import Callback
from ..training.distributed.failures import report_first_failure
from ..training.distributed.sharded_state import full_weights, local
from ..training.first_state import first_state
from ..training.inputs import RunInputs
from ..training.lora import LoraMasters
from ..training.report import describe
from ..training.resume import save_run
from ..training.run_state import RunState, TrainResult
from ..training.signals import interruptible
from ..training.trainer import Trainer
from .config import RLConfig
from .environments import Environment, roll_out_episodes
from .evaluate import FRESH, evaluate_task
from .policy import Packed, Policy, exact_obstacle, micro_batches, pack, token_weights
from .prompts import Prompts, open_prompts
from .report import RLProgress, write_rl_card
from .rewards import RewardError, RewardFunction, Rewards, load_function, open_rewards
from .rollouts import Rollouts, roll_out


def reinforce(
    config: RLConfig,
    reward: RewardFunction | Sequence[RewardFunction] = (),
    callbacks: Iterable[Callback] = (),
    environment: Callable[[], Environment] | None = None,
) -> Iterator[RLProgress]:
    """Run `config` as an iterator over steps that yields the metrics of each.

    `reward` is a function, or several, instead of `config.reward`; `environment` a class instead of its."""
    trainer = RLTrainer(config, list(callbacks), [reward] if callable(reward) else reward, environment)
    with interruptible(trainer.stop):
        yield from trainer.steps()


def run_reinforce(config: RLConfig, callbacks: Iterable[Callback] = ()) -> TrainResult:
    """Run `config` to its end."""
    trainer = RLTrainer(config, list(callbacks))
    with report_first_failure(), interruptible(trainer.stop):
        return trainer.run()


@dataclass(frozen=True)
class PromptData:
    """Stand-in for a dataset in run reports and resume checks: describes the prompts."""

    directory: str
    source: str
    tokenizer_sha256: str

    @property
    def meta(self) -> PromptData:
        return self


@dataclass(slots=True)
class StepStats:
    """Sums over the samples of a step, and the mismatch between the trainer's and the server's log-probabilities."""

    tokens: int = 0
    trained: int = 0
    k3: float = 0.0
    mismatch: float = 0.0
    seconds: float = 0.0


class RLTrainer(Trainer):
    """Trainer whose batches are rollouts and whose loss is the policy gradient."""

    state: RunState
    config: RLConfig

    def __init__(
        self,
        config: RLConfig,
        callbacks: list[Callback],
        rewards: Sequence[RewardFunction] = (),
        environment: Callable[[], Environment] | None = None,
    ) -> None:
        if config.dtype == "auto" and pick_device(config.device).type == "cpu":
            config = dataclasses.replace(config, dtype="float32")
        self.prompts = open_prompts(config.data, config.seed)
        self.environment = load_function(config.environment) if config.environment else environment
        self.score = None if self.environment else self._open_rewards(config, rewards)
        super().__init__(config, callbacks)
        self.stats = StepStats()

    def _open_rewards(self, config: RLConfig, given: Sequence[RewardFunction]) -> Rewards:
        if given:
            return Rewards(list(given), config.reward_weights or [1.0] * len(given), config.reward_seconds)
        if config.reward:
            return open_rewards(config.reward, config.reward_weights, config.reward_seconds)
        if self.prompts.task is None:
            raise InputError(f"data={config.data} is no task, so it has no score: give a reward, FILE.py:function")
        task = self.prompts.task
        return Rewards([lambda completion, row: task.score(completion, row)], [1.0], config.reward_seconds)

    def _open_inputs(self, reuse: bool) -> RunInputs:
        directory = resolve_model(str(self.config.init_from))
        tokenizer, file = read_tokenizer(directory), directory / "tokenizer.json"
        if tokenizer is None:
            raise InputError(f"{directory} has no tokenizer, so no prompt can be put to it")
        sha256 = file_hash(file) if file.is_file() else ""
        return RunInputs(PromptData(self.config.data, self.prompts.source, sha256), tokenizer, load_config(directory))

    def _start(self, inputs: RunInputs, dtype: torch.dtype) -> tuple[Prompts, RunState]:
        config = self.config
        steps = 10**9 if config.minutes is not None else config.steps or 100
        state = first_state(config, inputs, self.prompts, inputs.model.max_seq_len, self.mesh, dtype, steps)
        state.model.eval()  # for what samples has no dropout
        return self.prompts, state

    # What serves, and what is trained

    @functools.cached_property
    def llm(self) -> LLM:
        """The serving engine over the trained weights."""
        self._gather()
        return LLM(self.served, self.state.inputs.tokenizer, max_batch=self.config.max_batch)

    @functools.cached_property
    def served(self) -> Transformer:
        """The model that samples: the trained one, or with sharded weights a full copy beside it."""
        state = self.state
        if not self.mesh.is_sharded:
            return state.model
        return Transformer(state.inputs.model).to(state.device, state.dtype).requires_grad_(False).eval()

    @torch.no_grad()
    def _gather(self) -> None:
        """All-gather sharded weights into the model that samples; a collective call."""
        if self.mesh.is_sharded:
            slices = {name: local(p.detach()) for name, p in self.state.model.named_parameters()}
            for name, whole in full_weights(self.state.shards, slices):
                self.served.get_parameter(name).copy_(whole)

    @functools.cached_property
    def exact(self) -> bool:
        """Return whether the trainer computes the very bits that sampled."""
        asked, obstacle = self.config.exact, "exact=False"
        if asked is not False:
            obstacle = exact_obstacle(self.state.model, self.llm, asked is True)
        if obstacle and asked:
            raise InputError(f"exact=True cannot be kept: {obstacle}")
        if obstacle:
            self.note(f"trainer and server differ in their last digits ({obstacle}); the mismatch is measured")
        return obstacle is None

    def policy(self, update: int) -> Policy:
        """The policy to update; exact only in the first update of a step, while the server's head has its weights."""
        exact = self.exact and update == 0
        return Policy(self.state.model, self.llm if exact else None)

    @functools.cached_property
    def reference(self) -> Transformer:
        """Reference model for the KL penalty (the starting weights); with LoRA, the model without its adapter."""
        state = self.state
        if isinstance(state.masters, LoraMasters) and not self.config.lora_embeddings:
            return state.model
        model, _ = load_model(str(self.config.init_from), state.device, state.dtype)
        return model.requires_grad_(False)

    # A step

    def _batches(self) -> Iterator[Rollouts]:
        if self.state.step == 0:
            self._evaluate()
        while True:
            began = time.perf_counter()
            try:
                rollouts = self._roll_out()
            except RewardError as error:
                raise RewardError(f"{error}{self._rescue()}") from None
            rollouts.seconds = time.perf_counter() - began
            yield rollouts

    def _roll_out(self) -> Rollouts:
        asked = self.prompts, self._numbers(), self.state.step, self.config
        if self.environment:
            return roll_out_episodes(self.llm, self.environment, *asked)
        return roll_out(self.llm, *asked, self.score)

    def _numbers(self) -> range:
        """Numbers of the prompts of this step that are this process's."""
        own = self.config.batch_size // self.mesh.dp_size
        first = self.state.step * self.config.batch_size + self.mesh.dp_rank * own
        return range(first, first + own)

    def _rescue(self) -> str:
        if not self.state.step or self.mesh.size > 1:
            return ""
        save_run(self.state, self.checkpoints)
        return f"; saved to {self.checkpoints.path(self.state.step)}: resume continues from there"

    def one_step(self, rollouts: Rollouts) -> tuple[Any, ...]:
        """One RL step on these rollouts: `updates` optimizer steps, then the engine gets the new weights."""
        state, began = self.state, time.perf_counter()
        self.rollouts, self.stats = rollouts, StepStats()
        (tokens,) = self.mesh.all_reduce_sum(rollouts.count)
        self.stats.tokens = int(tokens)
        for update in range(self.config.updates):
            figures = self._one_update(rollouts, update)
        self._gather()
        self.llm.refresh()
        self.stats.seconds = time.perf_counter() - began
        state.step += 1
        state.tokens += self.stats.tokens
        return figures

    def _one_update(self, rollouts: Rollouts, update: int) -> tuple[Any, ...]:
        samples = [sample for sample in rollouts.samples if sample.advantage or self.config.kl]
        (everywhere,) = self.mesh.all_reduce_sum(len(samples))
        if not everywhere:  # all groups were of one mind: there is nothing to learn
            return self._reduce_step_stats(0.0), 0.0, self.learning_rate(self.state.step + 1), ()
        parts = micro_batches(samples, self.config.micro_tokens)
        if self.mesh.is_sharded:  # processes gather weights together: each needs as many micro-batches as any other
            missing = int(self.mesh.all_reduce_max(len(parts))) - len(parts)
            parts += [[dataclasses.replace(rollouts.samples[0], advantage=0.0)]] * missing
        return self._update(*self.accumulate_policy(parts, update))

    def accumulate_policy(self, parts: list, update: int) -> tuple[Tensor, list[Tensor]]:
        """Accumulate the policy gradient over micro-batches."""
        state, config, policy = self.state, self.config, self.policy(update)
        references = self._references(parts) if config.kl else [None] * len(parts)
        loss = torch.zeros((), device=state.device)
        if not parts:  # other processes have samples
            self.reducer.arm()
            for master in state.masters.named.values():
                master.grad = torch.zeros_like(master)
        for number, (samples, reference_S) in enumerate(zip(parts, references), 1):
            if number == len(parts):
                self.reducer.arm()
            packed = pack(samples, state.device)
            hidden_SC = policy.hidden(packed)
            logp_S = policy.log_probs(hidden_SC, packed.targets_S)
            if update == 0:
                self._compare(logp_S, packed)
            weights_S = token_weights(logp_S, packed, config.clip if update else None, config.kl, reference_S)
            part = state.model.cross_entropy(
                hidden_SC, packed.targets_S, weights=weights_S / self.stats.tokens, reduction="sum"
            )
            (part * state.loss_scale.value).backward()
            loss += part.detach().float()
        return loss, []

    @torch.no_grad()
    def _references(self, parts: list) -> list[Tensor]:
        """Reference log-probabilities of all micro-batches at once: with LoRA the adapter is off meanwhile."""
        masters, policy = self.state.masters, Policy(self.reference)
        own = isinstance(masters, LoraMasters) and policy.model is self.state.model
        with masters.switched_off() if own else contextlib.nullcontext():
            packed = [pack(samples, self.state.device) for samples in parts]
            return [policy.log_probs(policy.hidden(each), each.targets_S) for each in packed]

    def _compare(self, logp_S: Tensor, packed: Packed) -> None:
        """Record the mismatch between the trainer's and the server's log-probabilities."""
        change_S = logp_S.double() - packed.sampled_S
        self.stats.mismatch = max(self.stats.mismatch, float(change_S.abs().max()))
        self.stats.k3 += float((change_S.exp() - 1 - change_S).sum())
        self.stats.trained += len(change_S)

    # What is told

    def _report(self, loss: float, norm: float, lr: float, load: tuple[float, ...]) -> RLProgress:
        state, config, samples = self.state, self.config, self.rollouts.samples
        groups = [samples[start : start + config.group] for start in range(0, len(samples), config.group)]
        sums = self.mesh.all_reduce_sum(
            len(samples),
            sum(sample.reward for sample in samples),
            sum(sample.reward**2 for sample in samples),
            sum(sample.ended for sample in samples),
            -math.fsum(value for sample in samples for value in sample.logprobs),
            sum(any(sample.advantage for sample in group) for group in groups),
            self.stats.k3,
            self.stats.trained,
        )
        count, reward, squared, ended, surprise, mixed, k3, trained = sums
        mean, tokens = reward / count, self.stats.tokens
        pace = sum(self.step_seconds) / len(self.step_seconds)
        progress = RLProgress(
            step=state.step, steps=state.steps, reward=mean, reward_std=math.sqrt(max(0.0, squared / count - mean**2)),
            mixed=mixed * config.group / count, length=tokens / count, ended=ended / count, entropy=surprise / tokens,
            mismatch=self.mesh.all_reduce_max(self.stats.mismatch), mismatch_k3=k3 / max(trained, 1), lr=lr,
            grad_norm=norm, samples=int(count), tokens=state.tokens, sampled_per_second=tokens / self.rollouts.seconds,
            trained_per_second=trained / self.stats.seconds, seconds=state.seconds,
            seconds_left=(state.steps - state.step) * pace, bad_steps=state.bad_steps,
        )  # fmt: skip
        self.tell("on_step", progress)
        if progress.mismatch_k3 > config.max_mismatch:
            raise InputError(
                f"step {state.step}: the mismatch of server and trainer, a KL estimate of {progress.mismatch_k3:.2g}, "
                f"is above max_mismatch={config.max_mismatch}: use float32, or raise it{self._rescue()}"
            )
        return progress

    def _evaluate(self) -> None:
        """Evaluate on fresh problems of the task."""
        llm, task, problems = self.llm, self.prompts.task, self.config.eval_problems  # which every process makes
        if task is None or self.environment or not problems or not self.mesh.is_main:
            return
        seed = self.config.seed + FRESH
        found = evaluate_task(llm, task, problems, max_tokens=self.config.max_tokens, seed=seed)
        self.tell("on_evaluation", self.state.step, found)

    def _sample(self) -> None:
        """Report the first answer of the first two groups."""
        for sample in self.rollouts.samples[: 2 * self.config.group : self.config.group]:
            text = f"{sample.text}  (reward {sample.reward:g})"
            self.state.samples.append({"step": self.state.step, "prompt": sample.prompt, "text": text})
            self.tell("on_sample", self.state.step, sample.prompt, text)

    def _write_card(self, result: TrainResult) -> None:
        write_rl_card(self.out, describe(self.state), result, self.state.samples)
