"""The training loop.

    for each step:
        read the step's batch, a pure function of (seed, step)
        loss and gradients, micro-batch by micro-batch (gradient accumulation); gradients add up in float32
        clip, set the learning rate, step the optimizer, round the masters back into the model
        now and then: evaluate and keep the best, save a checkpoint, write a sample

Everything else here makes that loop robust: it can be stopped or killed at any moment and resumes bit for bit, a step
with a NaN or infinity is skipped and counted, and callbacks are told (`callbacks.py`). What the next step depends on is
in a `RunState`; the trainer adds only what is not saved.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...tokenizer.sources import sweep
from ..data.loader import Batch, prefetch
from ..data.pairs import PreferencePairs
from ..device import measured_matmul_flops, pick_dtype
from ..errors import InputError
from ..memory import keep_freed
from .batch_size_finder import find_grad_accum_steps
from .callbacks import Callback, JsonLog, Progress, TensorBoard, Wandb, check_packages
from .checkpoint import Checkpoints, lock_run, unlock_run
from .config import TrainConfig
from .distributed.grad_buckets import GradReducer
from .distributed.mesh import ProcessMesh, local_device
from .evaluate import evaluate, losses, sample_prompt, token_bytes, validation_batches, validation_split, write_sample
from .first_state import describe_rows, loader_and_state
from .inputs import RunInputs, prepare
from .mixed_precision import Masters
from .optim import AdamW, clip_grad_norm, clip_scale
from .preferences import add_reference, evaluate_pairs, every_pair
from .report import describe, write_card
from .resume import resume_run, save_run, write_weights
from .run_state import RunState, TrainResult
from .schedule import SCHEDULES
from .signals import interruptible

LARGE = 1 << 15  # tokens of a micro-batch; SmolLM2's default would be 16 rows of 8,192


def train(config: TrainConfig, callbacks: Iterable[Callback] = ()) -> TrainResult:
    """Run `config` to its end, or until SIGINT or SIGTERM; `callbacks` are told of every event."""
    trainer = Trainer(config, list(callbacks))
    with interruptible(trainer.stop):
        return trainer.run()


class Trainer:
    """Training loop over a `RunState`."""

    result: TrainResult

    def __init__(self, config: TrainConfig, callbacks: list[Callback]) -> None:
        device = local_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        self.config, self.mesh = config, ProcessMesh(device, config)
        self.callbacks = callbacks if self.mesh.is_main else []
        if self.mesh.is_main:
            check_packages(config.tensorboard, config.wandb)
        self.out, self.lock = Path(config.out), None
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.keep_last, self.mesh.is_main)
        with self.mesh.main_first():
            again = config.resume or self.mesh.restarted
            if self.mesh.is_main:
                self._prepare_out(again)
            elif self.mesh.is_sharded and not self.out.is_dir():
                raise InputError(f"out={self.out} is not there on this machine: all must see the folder they write to")
            inputs = self._open_inputs(reuse=again or not self.mesh.is_main)
        self.loader, self.state = self._start(inputs, dtype)
        self.reducer = GradReducer(self.mesh, self.state.masters)
        self.bytes_of = token_bytes(inputs.tokenizer)
        self.told_to_stop: str | None = None
        self.stop_signal: str | None = None
        self.speed = self.utilization = 0.0
        self.began = time.perf_counter()
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.pairs = self._open_pairs(again)
        if not config.grad_accum_steps:
            self.state.grad_accum_steps = find_grad_accum_steps(self.state, self.loader, self.note)
        if again:
            resume_run(self.state, self.checkpoints, self.note)
        self.log = JsonLog(self.out / "log.jsonl", config.log_every, self.state.step) if self.mesh.is_main else None
        self.callbacks = self._all_callbacks()

    # Setting up

    def _open_inputs(self, reuse: bool) -> RunInputs:
        return prepare(self.config, self.note, reuse)

    def _start(self, inputs: RunInputs, dtype: torch.dtype) -> tuple[Any, RunState]:
        loader, state = loader_and_state(self.config, inputs, self.mesh, dtype)
        if state.context not in (self.config.context, inputs.model.max_seq_len):
            self.note(describe_rows(state.context, inputs, self.config.order))
        self._warn_of_size(state.micro_batch_rows, state.context)
        return loader, state

    def _open_pairs(self, again: bool) -> PreferencePairs | None:
        """Compute the reference log-probabilities of preference pairs; return those to evaluate on."""
        if not isinstance(self.loader, PreferencePairs):
            return None
        split, state, name = validation_split(self.state.inputs.data), self.state, "reference-{}.npy"
        held_out = None if split is None else dataclasses.replace(self.loader, split=split, shuffle=False)
        rows = state.micro_batch_rows // self.mesh.dp_size
        for pairs in filter(None, (self.loader, held_out)):
            path = self.out / name.format(pairs.split.name)
            add_reference(state.model, pairs, rows, path, self.mesh.is_main, again)
        return held_out

    def _warn_of_size(self, rows: int, context: int) -> None:
        """Warn before a step that is too large for a CPU, as a published model's own context can make it: when memory
        runs out, the system kills the process without a message."""
        if self.config.grad_accum_steps and self.mesh.device.type == "cpu" and rows * context > LARGE:
            self.note(
                f"a micro-batch is {rows} rows of context={context} tokens: if that is slow or too large, give a "
                "shorter context, or grad_accum_steps=0, which fits it to the memory"
            )

    def _prepare_out(self, again: bool) -> None:
        config = self.config
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"out={config.out} is a file; a run is written to a directory")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = lock_run(self.out)
        if self.checkpoints.steps() and not again:
            if not config.overwrite:
                raise InputError(
                    f"{config.out} already holds a run (step {self.checkpoints.steps()[0]}): "
                    f"continue it with resume, replace it with overwrite, or choose another out"
                )
            shutil.rmtree(self.checkpoints.folder)
        sweep(self.out.parent, self.out.name)  # now, and not at a save: others are there before the main process then
        sweep(self.out)
        sweep(self.checkpoints.folder)

    def _all_callbacks(self) -> list[Callback]:
        if not self.mesh.is_main:
            return []
        chosen = [TensorBoard(self.out)] if self.config.tensorboard else []
        chosen += [Wandb(self.config.wandb)] if self.config.wandb else []
        return [*self.callbacks, self.log, *chosen]

    # The loop

    def run(self) -> TrainResult:
        """Train until the budget is used up or a signal arrives."""
        for _ in self.steps():
            pass
        return self.result

    def steps(self) -> Iterator[Any]:
        """Run as an iterator over steps that yields the metrics of each; `result` is set at the end."""
        state = self.state
        self.tell("on_start", describe(state))
        self.began = time.perf_counter() - state.seconds
        batches = self._batches()
        on_cpu = state.device.type == "cpu"
        if on_cpu:
            keep_freed(True)
        try:
            while state.step < state.steps and not self.stop_signal:
                tick = time.perf_counter()
                figures = self.one_step(next(batches))
                self.step_seconds.append(time.perf_counter() - tick)
                self._fit_to_budget()
                progress = self._report(*figures)
                self._run_periodic()
                if len(self.step_seconds) == 1:
                    gc.collect()
                    gc.freeze()  # objects alive now live as long as the run: the collector need not scan them
                yield progress
            state.seconds = time.perf_counter() - self.began
            self.result = self._finish()
            self.mesh.destroy()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise InputError(self._how_to_shrink()) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # torch's out-of-memory error on a CPU has no class
                raise InputError(self._how_to_shrink()) from error
            raise
        finally:
            batches.close()
            gc.unfreeze()
            if on_cpu:
                keep_freed(False)
            try:
                self.checkpoints.wait()
            finally:
                self.tell("on_end")
                unlock_run(self.lock)

    def _batches(self) -> Iterator[Any]:
        return prefetch(self.loader, self.state.step, self.state.device, self.config.num_workers)

    def _how_to_shrink(self) -> str:
        config, state = self.config, self.state
        rows = state.micro_batch_rows
        ways = [f"raise grad_accum_steps={state.grad_accum_steps}"] if rows > self.mesh.dp_size else []
        ways += ["set activation_checkpointing"] if not config.activation_checkpointing else []
        ways += [f"shorten context={state.context}"]
        ways += ["share the state with fsdp"] if self.mesh.axes["dp"] > 1 else []
        return f"out of memory on {state.device} with micro-batches of {rows} rows: {', or '.join(ways)}"

    def one_step(self, batch: Batch) -> tuple[float, float, float, tuple[float, ...]]:
        """One optimizer step: (loss, gradient norm, learning rate, (least, most loaded expert))."""
        state = self.state
        _seed(state.device, self.config.seed, state.step, self.mesh.dp_rank)  # dropout is a function of the step
        figures = self._update(*self.accumulate(batch))
        state.step += 1
        self.step_tokens = batch.tokens_BT.numel()
        state.tokens += self.step_tokens
        return figures

    def _update(self, loss: Tensor, load: list[Tensor]) -> tuple[float, float, float, tuple[float, ...]]:
        """Clip and apply the accumulated gradients, unless they are not finite."""
        state = self.state
        parameters = list(state.masters.named.values())
        self.reducer.wait()
        state.loss_scale.unscale(parameters)
        limit, joint_norm = self.config.max_grad_norm or math.inf, self.mesh.grad_norm(state.masters)
        copies = self._one_pass_copies()
        clip_grad_norm([p for p in parameters if p not in copies], limit, joint_norm)
        mine, norm, *figures = torch.stack([loss, joint_norm, *load]).tolist()  # the step's only GPU synchronization
        lost = self._reduce_step_stats(mine / self.mesh.axes["tp"])
        finite = math.isfinite(lost) and math.isfinite(norm)
        lr = self.learning_rate(state.step + 1)
        if finite:
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            if copies:
                cast(AdamW, state.optimizer).step_and_copy(copies, clip_scale(joint_norm, limit))
            else:
                state.optimizer.step()
            state.masters.copy_to_model(but=copies)
            state.ema.update()
        state.masters.zero_grad()
        self._check_finite(finite, lost, norm)
        return lost, norm, lr, tuple(figures)

    def _one_pass_copies(self) -> dict[Tensor, Tensor]:
        """Large weights on a GPU, for which clipping, AdamW and the copy to the model are one kernel."""
        whole = type(self.state.optimizer) is AdamW and type(self.state.masters) is Masters
        return self.state.masters.copies(AdamW.ONE_PASS) if whole else {}

    def accumulate(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Gradient accumulation over micro-batches, each weighted by its share of the step's targets.

        Returns their loss, and the loads of the least and the most loaded expert in the last of them.
        """
        state, config = self.state, self.config
        rows = state.micro_batch_rows
        targets = batch.weight.clamp(min=1)  # a batch may hold no target (masked prompts)
        loss = torch.zeros((), device=state.device)
        for start in range(0, config.batch_size, rows):
            if start + rows == config.batch_size:
                self.reducer.arm()  # all-reduce starts as soon as a bucket is complete
            micro = self.mesh.local_rows(batch.rows(start, start + rows))
            share = micro.weight / targets
            parts = losses(state.model, micro, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
            (parts.total * (share * state.loss_scale.value)).backward()
            loss += parts.cross_entropy.detach().float() * share
            load = parts.expert_load
            del parts  # frees the graph before the next micro-batch's is built
        if load is None:
            return loss, []
        shares = load.float().mean(0) * load.shape[-1] / load.float().mean(0).sum()
        return loss, [shares.min(), shares.max()]

    def _reduce_step_stats(self, loss: float) -> float:
        """All-reduce the loss, the elapsed time and the stop request of the step."""
        seconds = time.perf_counter() - self.began
        loss, stops, seconds = self.mesh.all_reduce_sum(loss, bool(self.told_to_stop), seconds)
        self.state.seconds = seconds / self.mesh.size
        if stops:
            self.stop_signal = self.told_to_stop or "another process"
        return loss

    def stop(self, reason: str) -> None:
        """Request the end of the run after the current step (one later with several processes)."""
        self.told_to_stop = reason

    def learning_rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 1; with a time budget, by the share of time used."""
        config, total = self.config, self.state.steps
        warmup = self.warmup
        if config.minutes is not None and config.warmup is None:
            step, warmup, total = self.state.seconds / (60 * config.minutes), 0.05, 1.0
        least = config.lr / 10 if config.min_lr is None else config.min_lr
        return SCHEDULES[config.schedule](step, config.lr, least, warmup, total)

    @functools.cached_property
    def warmup(self) -> int:
        return min(500, self.state.steps // 20) if self.config.warmup is None else self.config.warmup

    def _fit_to_budget(self) -> None:
        """With a time budget, extrapolate the number of steps from the pace so far."""
        if self.config.minutes is None:
            return
        state, share = self.state, self.state.seconds / (60 * self.config.minutes)
        state.steps = state.step if share >= 1 else max(state.step + 1, int(state.step / share))

    def _check_finite(self, finite: bool, loss: float, norm: float) -> None:
        state, scale = self.state, self.state.loss_scale
        overflow = not finite and scale.active and scale.value > 1
        scale.update(finite)
        if finite:
            state.bad_run = 0
            if spike := state.spikes.judge(loss):
                self.note(f"step {state.step + 1}: {spike}")
        elif not overflow:
            state.bad_steps, state.bad_run = state.bad_steps + 1, state.bad_run + 1
            self.note(f"step {state.step + 1} skipped: loss {loss}, gradient norm {norm}")
            if state.bad_run >= self.config.max_nonfinite_steps:
                saved = [self.checkpoints.path(step) for step in self.checkpoints.steps()]
                raise InputError(
                    f"{state.bad_run} steps in a row had a loss or gradient that is not finite (the last: step "
                    f"{state.step + 1}, loss {loss}, gradient norm {norm}): lower lr={self.config.lr}, lengthen the "
                    f"warmup, or train in float32; last checkpoint: {saved[0] if saved else None}"
                )

    def _run_periodic(self) -> None:
        config, state = self.config, self.state
        last = state.step >= state.steps
        if last or (config.eval_every and state.step % config.eval_every == 0):
            self._evaluate()
        if config.sample_tokens and (last or (config.sample_every and state.step % config.sample_every == 0)):
            self._sample()
        if self.mesh.size == 1:  # heard here alone, so that no run ends with a step that is not saved
            self.stop_signal = self.told_to_stop
        if last or self.stop_signal or (config.save_every and state.step % config.save_every == 0):
            save_run(state, self.checkpoints)

    def _evaluate(self) -> None:
        """Evaluate on the validation split (or `eval_batches` of it), and write the model if it is the best so far."""
        state, config = self.state, self.config
        split = validation_split(state.inputs.data)
        if split is None:
            return
        with state.ema.applied():
            if self.pairs:
                found = evaluate_pairs(state.model, every_pair(self.pairs, config.eval_batches))
            else:
                batches = validation_batches(split, config.batch_size, state.context, config.eval_batches)
                found = evaluate(state.model, batches, self.bytes_of, state.micro_batch_rows // self.mesh.dp_size)
        self.tell("on_evaluation", state.step, found)
        if state.best is None or found.loss < state.best.loss:
            state.best = found
            write_weights(state, self.out)

    def _sample(self) -> None:
        """Generate a sample from `sample_prompt` or the start of the validation text (for conversations, an answer)."""
        state, config, tokenizer = self.state, self.config, self.state.inputs.tokenizer
        split = validation_split(state.inputs.data) or state.train_split
        prompt = tokenizer.encode(config.sample_prompt) if config.sample_prompt else sample_prompt(split)
        prompt = prompt[-(state.context // 2) :]
        stop = () if split.learn is None else tuple(tokenizer.special.stop_ids())
        with state.ema.applied():
            before, text = write_sample(state.model, tokenizer, prompt, config.sample_tokens, config.seed, stop)
        state.samples.append({"step": state.step, "prompt": before, "text": text})
        self.tell("on_sample", state.step, before, text)

    def _report(self, loss: float, norm: float, lr: float, load: tuple[float, ...]) -> Progress:
        state, pace = self.state, sum(self.step_seconds) / len(self.step_seconds)
        speed = self.step_tokens / pace
        self.speed, self.utilization = speed, speed * self.flops_per_token / (self.peak * self.mesh.size)
        progress = Progress(
            step=state.step, steps=state.steps, loss=loss, lr=lr, grad_norm=norm, tokens=state.tokens,
            tokens_per_second=speed, seconds=state.seconds, seconds_left=(state.steps - state.step) * pace,
            utilization=self.utilization, val_loss=state.best.loss if state.best else None,
            bad_steps=state.bad_steps, expert_load=load or None,
        )  # fmt: skip
        self.tell("on_step", progress)
        return progress

    @functools.cached_property
    def peak(self) -> float:
        device, dtype = self.state.device, self.state.dtype
        emulated = device.type == "cpu" and dtype == torch.float16  # a large product would take seconds
        return measured_matmul_flops(device, torch.float32 if emulated else dtype)

    @functools.cached_property
    def flops_per_token(self) -> float:
        return self.state.inputs.model.flops_per_token(self.state.context)

    # The end

    def _finish(self) -> TrainResult:
        state = self.state
        self.checkpoints.wait()
        if self.stop_signal:
            saved = self.checkpoints.path(state.step)
            what = f"saved to {saved}: resume continues from there" if saved.exists() else "there was nothing to save"
            self.note(f"stopped by {self.stop_signal} at step {state.step} of {state.steps}; {what}")
        if state.best is None:
            write_weights(state, self.out)
        result = TrainResult(
            directory=self.out,
            val_loss=state.best.loss if state.best else None,
            evaluation=state.best,
            history=self.log.lines if self.log else [],
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=self.speed,
            stopped_by=self.stop_signal,
        )
        if self.mesh.is_main:
            self._write_card(result)
        return result

    def _write_card(self, result: TrainResult) -> None:
        write_card(self.out, describe(self.state), result, self.utilization, self.state.samples)

    def tell(self, event: str, *details: Any) -> None:
        """Call a method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(*details)

    def note(self, text: str) -> None:
        self.tell("on_message", text)


def _seed(device: torch.device, seed: int, step: int, dp_rank: int) -> None:
    """Seed dropout by (seed, step, dp_rank): processes with the same rows drop the same activations."""
    sequence = np.random.SeedSequence([seed, step], spawn_key=(dp_rank,) if dp_rank else ())
    number = int(sequence.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)  # torch.manual_seed asks all kinds of devices, for half a millisecond
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
