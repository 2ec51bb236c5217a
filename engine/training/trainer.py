"""The training loop.

    for each step:
        read the step's rows, a pure function of (seed, step)
        loss and gradients, micro-batch by micro-batch, in bfloat16; gradients add up in float32
        clip, set the learning rate, step the optimizer, round the masters back into the model
        now and then: evaluate and keep the best, save a checkpoint, write a sample

Everything else here keeps that loop honest: it can be stopped and killed at any moment and resumes to the same bits, a
step that is not finite is skipped and counted, and whoever wants to watch is told (`watch.py`).
"""

from __future__ import annotations

import functools
import gc
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tokenizer.sources import sweep
from ..data.loader import IGNORE, Batch, open_loader, prefetch
from ..device import measured_matmul_flops, pick_device, pick_dtype
from ..errors import InputError
from .batch_size_finder import fewest_micro_batches
from .build_model import build
from .callbacks import JsonLog, Progress, Spikes, TensorBoard, Wandb, Watcher, check_packages
from .checkpoint import Checkpoints, claim, give_back
from .config import TrainConfig
from .distributed.grad_buckets import Exchange
from .distributed.mesh import Team, make_masters
from .evaluate import Evaluation, losses, token_bytes
from .inputs import Materials, prepare
from .milestones import evaluate_run, publish, write_sample
from .mixed_precision import Average, LossScale
from .optim import AdamW, Muon, SGDDecay, clip_grad_norm, parameter_groups
from .report import describe, write_card
from .resume import resume_run, save_run
from .schedule import SCHEDULES
from .signals import interruptible


@dataclass(frozen=True)
class TrainResult:
    """What came of a run. `directory` holds the best model by validation loss."""

    directory: Path
    val_loss: float | None
    evaluation: Evaluation | None
    """The best evaluation, over the whole validation split or `eval_batches` of it."""
    history: list[dict[str, Any]]
    """The lines of log.jsonl: training losses (`loss`) and evaluations (`val_loss` without `loss`)."""
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    stopped_by: str | None = None
    """The signal that ended the run early, if one did; its state is saved and `resume` continues it."""


def train(config: TrainConfig, watchers: Iterable[Watcher] = ()) -> TrainResult:
    """Run `config` to its end, or until SIGINT or SIGTERM; `watchers` hear what happens on the way."""
    trainer = Trainer(config, list(watchers))
    with interruptible(trainer.stop):
        return trainer.run()


class Trainer:
    """One run: its materials, its state, and the loop over them."""

    def __init__(self, config: TrainConfig, watchers: list[Watcher]) -> None:
        self.device = _own_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.team = Team(self.device, config)
        self.config, self.watchers = config, watchers if self.team.leads else []
        if self.team.leads:
            check_packages(config.tensorboard, config.wandb)
        self.out, self.claimed = Path(config.out), None
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.keep_last, self.team.leads)
        with self.team.leader_first():
            again = config.resume or self.team.restarted
            if self.team.leads:
                self._make_room(again)
            elif self.team.splits_state and not self.out.is_dir():
                raise InputError(f"out={self.out} is not there on this machine: all must see the folder they write to")
            self.materials: Materials = prepare(config, self.note, reuse=again or not self.team.leads)
        model_config = self.materials.model
        self.context = config.context or model_config.max_seq_len
        self.train_split = self.materials.data.split("train")
        self.loader = open_loader(
            config.order, self.train_split, config.batch_size, self.context, config.seed, config.stride
        )
        self.steps = self._count_steps()
        self.warmup = min(500, self.steps // 20) if config.warmup is None else config.warmup
        self.model, self.pieces = build(config, model_config, self.team, self.dtype)
        self.masters = make_masters(self.model, self.dtype, self.team)
        self.exchange = Exchange(self.team, self.masters)
        self.average = Average(self.masters, config.ema)
        self.optimizer = self._make_optimizer()
        self.scale = LossScale(self.dtype)
        self.bytes_of = token_bytes(self.materials.tokenizer)
        self.step, self.tokens, self.seconds, self.bad_steps, self.bad_run = 0, 0, 0.0, 0, 0
        self.best: Evaluation | None = None
        self.samples: list[dict[str, Any]] = []
        self.told_to_stop: str | None = None
        self.stop_signal: str | None = None
        self.speed = self.utilization = 0.0
        self.began = time.perf_counter()
        self.spikes = Spikes()
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.micro_batches = config.grad_accum_steps or fewest_micro_batches(self)
        if again:
            resume_run(self)
        self.log = JsonLog(self.out / "log.jsonl", config.log_every, self.step) if self.team.leads else None
        self.watchers = self._all_watchers()

    # Setting up

    def _make_room(self, again: bool) -> None:
        config = self.config
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"out={config.out} is a file; a run is written to a directory")
        self.out.mkdir(parents=True, exist_ok=True)
        self.claimed = claim(self.out)
        if self.checkpoints.steps() and not again:
            if not config.overwrite:
                raise InputError(
                    f"{config.out} already holds a run (step {self.checkpoints.steps()[0]}): "
                    f"continue it with resume, replace it with overwrite, or choose another out"
                )
            shutil.rmtree(self.checkpoints.folder)
        sweep(self.out.parent, self.out.name)  # now, and not at a save: others are there before the leader then
        sweep(self.out)
        sweep(self.checkpoints.folder)

    def _count_steps(self) -> int:
        config, tokens_a_step = self.config, self.config.batch_size * self.context
        if config.minutes is not None:
            return 10**9  # replaced by an estimate as soon as the pace is known
        if config.epochs is not None:
            return max(1, math.ceil(config.epochs * len(self.loader)))
        if config.tokens is not None:
            return max(1, math.ceil(config.tokens / tokens_a_step))
        return config.steps or 1000

    def _all_watchers(self) -> list[Watcher]:
        if not self.team.leads:
            return []
        chosen = [TensorBoard(self.out)] if self.config.tensorboard else []
        chosen += [Wandb(self.config.wandb)] if self.config.wandb else []
        return [*self.watchers, self.log, *chosen]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(self.masters.named.items(), config.weight_decay)
        if config.optimizer == "sgd":
            return SGDDecay(self.masters.named.values(), config.lr)
        settings = {"betas": (config.beta1, config.beta2), "eps": config.eps}
        if config.optimizer == "adamw":
            return AdamW(groups, config.lr, **settings)
        names = {p: name for name, p in self.masters.named.items()}
        return Muon(
            groups, config.lr, **settings, dtype=torch.float32 if self.dtype == torch.float32 else torch.bfloat16,
            on_whole=lambda p, part, rule: self.pieces.on_whole(names[p], part, rule),
        )  # fmt: skip

    # The loop

    def run(self) -> TrainResult:
        """Train until the budget is used or a signal arrives."""
        self.tell("started", describe(self))
        self.began = time.perf_counter() - self.seconds
        batches = prefetch(self.loader, self.step, self.device, self.config.num_workers)
        try:
            while self.step < self.steps and not self.stop_signal:
                tick = time.perf_counter()
                progress = self.one_step(next(batches))
                self.step_seconds.append(time.perf_counter() - tick)
                self._fit_to_budget()
                self._report(*progress)
                self._now_and_then()
                if len(self.step_seconds) == 1:
                    gc.collect()
                    gc.freeze()  # what exists now lives as long as the run: no need to search it for garbage
            self.seconds = time.perf_counter() - self.began
            result = self._finish()
            self.team.leave()
            return result
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise InputError(self._how_to_shrink()) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # what torch says on a CPU, without a class for it
                raise InputError(self._how_to_shrink()) from error
            raise
        finally:
            batches.close()
            gc.unfreeze()
            try:
                self.checkpoints.wait()
            finally:
                self.tell("finished")
                give_back(self.claimed)

    def _how_to_shrink(self) -> str:
        config, rows = self.config, self.config.batch_size // self.micro_batches
        ways = [f"raise grad_accum_steps={self.micro_batches}"] if rows > self.team.readers else []
        ways += ["set activation_checkpointing"] if not config.activation_checkpointing else []
        ways += [f"shorten context={self.context}"]
        ways += ["share the state with fsdp"] if self.team.axes["dp"] > 1 else []
        return f"out of memory on {self.device} with micro-batches of {rows} rows: {', or '.join(ways)}"

    def one_step(self, batch: Batch) -> tuple[float, float, float, tuple[float, ...]]:
        """One optimizer step: (loss, gradient norm, learning rate, least and most loaded expert)."""
        _seed(self.device, self.config.seed, self.step, self.team.reader)  # dropout is a function of the step
        loss, load = self.accumulate(batch)
        parameters = list(self.masters.named.values())
        self.exchange.end()
        self.scale.unscale(parameters)
        norm = clip_grad_norm(parameters, self.config.max_grad_norm or math.inf, self.team.norm(self.masters))
        loss, norm, *load = torch.stack([loss, norm, *load]).tolist()  # a GPU is waited for only here
        loss = self._agree(loss / self.team.axes["tp"])
        finite = math.isfinite(loss) and math.isfinite(norm)
        lr = self.learning_rate(self.step + 1)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.masters.publish()
            self.average.update()
        self.masters.zero_grad()
        self._judge(finite, loss, norm)
        self.step += 1
        self.tokens += batch.tokens_BT.numel()
        return loss, norm, lr, tuple(load)

    def accumulate(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Add up gradients over micro-batches, each weighted by its share of the step's targets.

        Tells their loss, and the loads of the least and the most loaded expert in the last of them.
        """
        rows = self.config.batch_size // self.micro_batches
        targets = (batch.targets_BT != IGNORE).sum()
        loss = torch.zeros((), device=self.device)
        for start in range(0, self.config.batch_size, rows):
            if start + rows == self.config.batch_size:
                self.exchange.begin()  # gradients leave as soon as they are complete
            micro = self.team.share(batch.rows(start, start + rows))
            share = (micro.targets_BT != IGNORE).sum() / targets
            parts = losses(self.model, micro, label_smoothing=self.config.label_smoothing, z_loss=self.config.z_loss)
            (parts.total * (share * self.scale.value)).backward()
            loss += parts.cross_entropy.detach().float() * share
            load = parts.expert_load
            del parts  # else what its graph keeps would stand beside that of the next micro-batch
        if load is None:
            return loss, []
        shares = load.float().mean(0) * load.shape[-1] / load.float().mean(0).sum()
        return loss, [shares.min(), shares.max()]

    def _agree(self, loss: float) -> float:
        """What all processes must know alike: the loss, how much time has passed, whether one was told to stop."""
        seconds = time.perf_counter() - self.began
        loss, stops, seconds = self.team.total(loss, bool(self.told_to_stop), seconds)
        self.seconds = seconds / self.team.size
        if stops:
            self.stop_signal = self.told_to_stop or "another process"
        return loss

    def stop(self, reason: str) -> None:
        """End the run after the step at hand, or the next one where other processes have to be told."""
        self.told_to_stop = reason

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, counted from 1; with a budget of time, of the share of it that is used."""
        config, warmup, total = self.config, self.warmup, self.steps
        if config.minutes is not None and config.warmup is None:
            step, warmup, total = self.seconds / (60 * config.minutes), 0.05, 1.0
        least = config.lr / 10 if config.min_lr is None else config.min_lr
        return SCHEDULES[config.schedule](step, config.lr, least, warmup, total)

    def _fit_to_budget(self) -> None:
        """With a budget of time, the number of steps is what the pace so far promises."""
        if self.config.minutes is None:
            return
        share = self.seconds / (60 * self.config.minutes)
        self.steps = self.step if share >= 1 else max(self.step + 1, int(self.step / share))

    def _judge(self, finite: bool, loss: float, norm: float) -> None:
        overflow = not finite and self.scale.active and self.scale.value > 1
        self.scale.update(finite)
        if finite:
            self.bad_run = 0
            if spike := self.spikes.judge(loss):
                self.note(f"step {self.step + 1}: {spike}")
        elif not overflow:
            self.bad_steps, self.bad_run = self.bad_steps + 1, self.bad_run + 1
            self.note(f"step {self.step + 1} skipped: loss {loss}, gradient norm {norm}")
            if self.bad_run >= self.config.max_nonfinite_steps:
                saved = [self.checkpoints.path(step) for step in self.checkpoints.steps()]
                raise InputError(
                    f"{self.bad_run} steps in a row had a loss or gradient that is not finite (the last: step "
                    f"{self.step + 1}, loss {loss}, gradient norm {norm}): lower lr={self.config.lr}, lengthen the "
                    f"warmup, or train in float32; last checkpoint: {saved[0] if saved else None}"
                )

    def _now_and_then(self) -> None:
        config, last = self.config, self.step >= self.steps
        if last or (config.eval_every and self.step % config.eval_every == 0):
            evaluate_run(self)
        if config.sample_tokens and (last or (config.sample_every and self.step % config.sample_every == 0)):
            write_sample(self)
        if self.team.size == 1:  # heard here alone, so that no run ends with a step that is not saved
            self.stop_signal = self.told_to_stop
        if last or self.stop_signal or (config.save_every and self.step % config.save_every == 0):
            save_run(self)

    def _report(self, loss: float, norm: float, lr: float, load: tuple[float, ...]) -> None:
        pace = sum(self.step_seconds) / len(self.step_seconds)
        speed = self.config.batch_size * self.context / pace
        self.speed, self.utilization = speed, speed * self.flops_per_token / (self.peak * self.team.size)
        progress = Progress(
            step=self.step, steps=self.steps, loss=loss, lr=lr, grad_norm=norm, tokens=self.tokens,
            tokens_per_second=speed, seconds=self.seconds, seconds_left=(self.steps - self.step) * pace,
            utilization=self.utilization, val_loss=self.best.loss if self.best else None,
            bad_steps=self.bad_steps, expert_load=load or None,
        )  # fmt: skip
        self.tell("stepped", progress)

    @functools.cached_property
    def peak(self) -> float:
        emulated = self.device.type == "cpu" and self.dtype == torch.float16  # a large product would take seconds
        return measured_matmul_flops(self.device, torch.float32 if emulated else self.dtype)

    @functools.cached_property
    def flops_per_token(self) -> float:
        return self.materials.model.flops_per_token(self.context)

    # The end

    def _finish(self) -> TrainResult:
        self.checkpoints.wait()
        if self.stop_signal:
            saved = self.checkpoints.path(self.step)
            what = f"saved to {saved}: resume continues from there" if saved.exists() else "there was nothing to save"
            self.note(f"stopped by {self.stop_signal} at step {self.step} of {self.steps}; {what}")
        if self.best is None:
            publish(self)
        result = TrainResult(
            directory=self.out,
            val_loss=self.best.loss if self.best else None,
            evaluation=self.best,
            history=self.log.lines if self.log else [],
            steps=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=self.speed,
            stopped_by=self.stop_signal,
        )
        if self.team.leads:
            write_card(self.out, describe(self), result, self.utilization, self.samples)
        return result

    # Telling and being told

    def tell(self, event: str, *details: Any) -> None:
        """Report an event to every watcher."""
        for watcher in self.watchers:
            getattr(watcher, event)(*details)

    def note(self, text: str) -> None:
        self.tell("noted", text)


def _seed(device: torch.device, seed: int, step: int, reader: int) -> None:
    """Processes that read the same rows drop the same numbers, others do not."""
    sequence = np.random.SeedSequence([seed, step], spawn_key=(reader,) if reader else ())
    number = int(sequence.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)  # torch.manual_seed asks all kinds of devices, for half a millisecond
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _own_device(name: str) -> torch.device:
    """Under torchrun, each process of a machine has a GPU of its own."""
    device, number = pick_device(name), os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or number is None:
        return device
    if int(number) >= torch.cuda.device_count():
        raise InputError(f"torchrun started a process for GPU {number}, but there are {torch.cuda.device_count()} here")
    device = torch.device("cuda", int(number))
    torch.cuda.set_device(device)  # before the processes meet: NCCL asks for the current one
    return device
