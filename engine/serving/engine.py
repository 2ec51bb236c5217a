"""Engine loop: plan a step, run it, deliver tokens.

`step()` is the whole loop body: run queued commands, launch as many plans as may be in flight, collect the oldest
result, hand every new token to its listener. A caller that waits for a result may drive the loop itself, as
`LLM.generate` does; a server starts the thread instead. `submit` and `cancel` are thread-safe: they validate, enqueue a
command and return; the loop runs the commands between two steps. If a step fails, its sequences are computed again,
each alone: the one that fails again ends with the error, the others go on.
"""

import atexit
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from ..errors import InputError
from .detokenizer import TextStream
from .outputs import EngineError, Metrics, Output, Piece
from .sampling_params import SamplingParams
from .scheduling.pace import StepPace
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import Sequence
from .scheduling.step import ChunkResult, StepPlan, StepResult
from .structured_output import MinTokens

Result = TypeVar("Result")
LAST_STEP = 10.0  # seconds that interpreter exit waits for the current step
_GOLDEN = 0x9E3779B97F4A7C15


class PlanRunner(Protocol):
    """Interface of a runner of step plans: one model, a model with its draft, or several processes."""

    model: Any

    @property
    def alive(self) -> bool:
        """Return whether the runner can run further plans."""
        ...

    def launch(self, plan: StepPlan) -> Any:
        """Start running a plan, asynchronously on a GPU."""
        ...

    def collect(self, flight: Any) -> StepResult:
        """Wait for a launched plan; return its result."""
        ...

    def close(self) -> object:
        """Release all resources."""
        ...


class Continuation:
    """Output side of one sequence: collects tokens, text and log-probabilities, and emits `Piece`s."""

    def __init__(self, sequence: Sequence, text: TextStream, index: int, tell: Callable[[Piece], None]):
        self.sequence, self.index = sequence, index
        self.metrics = Metrics(sequence.arrival, seed=sequence.seed)
        self.logprobs: list = []
        self.prompt_logprobs: list = []
        self.pooled: Any = None
        self._computed_again = 0
        self.error: BaseException | None = None
        self.finished = False
        self._text, self._tell = text, tell
        if text.text:
            tell(Piece(text.text, index=index))

    def receive(self, tokens: tuple[int, ...], result: ChunkResult, now: float) -> bool:
        """Append new tokens; return whether a stop string was found."""
        if result.prompt_logprobs and self._computed_again != self.sequence.preemptions:
            self._computed_again = self.sequence.preemptions
            self.prompt_logprobs.clear()  # a prompt that lost its pages is scored again from its beginning
        self.prompt_logprobs += result.prompt_logprobs
        self.pooled = result.pooled if result.pooled is not None else self.pooled
        if not tokens:
            return False
        if self.metrics.first_token is None:
            self.metrics.first_token = now
            self.metrics.cached_tokens = self.sequence.cached_tokens
        pieces = []
        for number, token in enumerate(tokens, 1):
            pieces.append(self._text.push(token))
            if self._text.stopped:
                tokens = tokens[:number]
                break
        logprobs = result.logprobs[: len(tokens)]
        self.logprobs += logprobs
        self.metrics.generated_tokens += len(tokens)
        self._tell(Piece("".join(pieces), tokens, None, logprobs, self.index))
        return self._text.stopped

    def end(self, reason: str, now: float) -> None:
        """Finish: emit the last piece."""
        self.finished = True
        self.metrics.finished = now
        for count in ("preemptions", "drafted", "accepted_drafts"):
            setattr(self.metrics, count, getattr(self.sequence, count))
        self._tell(Piece(self._text.finish(), (), reason, (), self.index))

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, or None."""
        return self._text.stop_string

    def output(self) -> Output:
        """The complete `Output`, once finished."""
        sequence, params = self.sequence, self.sequence.params
        start = sequence.prompt_length
        return Output(
            self._text.text,
            tuple(sequence.tokens[start : start + self.metrics.generated_tokens]),
            sequence.finish_reason or "",
            tuple(sequence.tokens[:start]),
            None if params.logprobs is None else tuple(self.logprobs),
            None if params.prompt_logprobs is None else tuple(self.prompt_logprobs),
            self.metrics,
        )


class Generation:
    """Handle of a submitted request: its `n` continuations and the queue of pieces."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self.streams: list[Continuation] = []
        self.pieces: SimpleQueue[Piece] = SimpleQueue()

    @property
    def finished(self) -> bool:
        """Return whether all continuations have ended."""
        return all(stream.finished for stream in self.streams)

    def cancel(self) -> None:
        """Cancel the request; thread-safe and idempotent."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces as they arrive, until all continuations have ended; leaving early cancels."""
        ended = 0
        try:
            while ended < len(self.streams):
                self._engine.pump(self)
                piece = self.pieces.get()
                ended += piece.finish_reason is not None
                yield piece
            self._raise_error()
        finally:
            self.cancel()

    def result(self) -> Output:
        """Wait for the end and return the complete output."""
        self._engine.wait(self)
        self._raise_error()
        first, *others = (stream.output() for stream in self.streams)
        if not others:
            return first
        return Output(
            **{name: getattr(first, name) for name in Output.__slots__ if name != "others"}, others=(*others,)
        )

    def _raise_error(self) -> None:
        error = next((stream.error for stream in self.streams if stream.error), None)
        if error:
            raise EngineError(f"the engine failed while computing this request: {error}") from error


class Engine:
    """Inference engine: a scheduler, a runner, and the loop that connects them."""

    def __init__(
        self, scheduler: Scheduler, runner: PlanRunner, tokenizer: Any = None, eos: frozenset[int] = frozenset()
    ):
        self.scheduler, self.runner, self.tokenizer, self.eos = scheduler, runner, tokenizer, eos
        self.failures = 0  # failed steps
        self.failed_alone = 0  # failures of steps with at most one sequence
        self.last_error: BaseException | None = None
        self.generated_tokens = 0
        self.pace: StepPace | None = None  # None: every step may have all its tokens
        self._collected = 0.0  # when the last step ended
        self._commands: deque[Callable[[], None]] = deque()
        self._flights: deque = deque()
        self._lock, self._arriving = threading.Lock(), threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
        salt: object = None,
        adapter: str | None = None,
        grammar: Callable[[], object] | None = None,
        pooling: str | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Generation:
        """Submit a request; an InputError refuses one that could never be served. `deadline` is in seconds from now.

        With `pooling`, mean or last, the prompt's hidden states are pooled so, and `Continuation.pooled` has them.
        """
        self._check(tokens, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        generation = Generation(self)
        limit = self.scheduler.context if params.max_tokens is None else params.max_tokens
        limit = self.scheduler.fit(len(tokens), limit)
        with self._arriving:  # commands are enqueued in the order of arrival times
            now = time.monotonic()
            for index in range(params.n):
                sequence = Sequence(list(tokens), len(tokens), params, _nth_seed(seed, index), limit)
                ends = frozenset() if params.ignore_eos else self.eos
                sequence.stop_tokens = frozenset(params.stop_token_ids) | ends
                sequence.arrival, sequence.priority, sequence.adapter = now, priority, adapter
                sequence.salt = salt if adapter is None else (adapter, salt)  # never shared over adapters
                sequence.deadline = None if deadline is None else now + deadline
                sequence.grammar = grammar() if grammar else None
                if params.min_tokens and not grammar:
                    sequence.grammar = MinTokens(params.min_tokens, sequence.stop_tokens)
                sequence.use_cache = params.prompt_logprobs is None and pooling is None
                sequence.pooling = pooling
                tell = on_piece or generation.pieces.put
                sequence.listener = Continuation(sequence, self._text(tokens, params), index, tell)
                generation.streams.append(sequence.listener)
            first, *others = (stream.sequence for stream in generation.streams)
            first.followers = tuple(others)
            self._enqueue(lambda: self.scheduler.add(first))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Cancel a generation in any state; its pages are free before the next step."""
        if not generation.finished:
            self._enqueue(lambda: self._cancel_now(generation))

    def step(self) -> bool:
        """Run one iteration of the loop; False when idle."""
        with self._lock:
            try:
                return self._turn()
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):
                    raise
                return True

    def call(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the scheduler between two steps."""
        with self._lock:
            self._run_commands()
            result = action()
            self._tell_ended()
        self._wake.set()
        return result

    def drive(self, until: Callable[[], bool]) -> None:
        """Step the loop (or wait for its thread) until a condition holds."""
        while not until():
            if self._thread is None:
                self.step()
            else:
                time.sleep(0.0005)

    def pump(self, generation: Generation) -> None:
        """Step the loop until the generation has a piece to read; no-op if the thread runs it."""
        while self._thread is None and generation.pieces.empty() and not generation.finished:
            self.step()

    def wait(self, generation: Generation) -> None:
        """Wait until the generation has ended."""
        self.drive(lambda: generation.finished)

    def start(self) -> None:
        """Start a background thread that runs the loop."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="warploom-engine", daemon=True)
            self._thread.start()
            atexit.register(self._end_thread, LAST_STEP)

    def stop(self) -> None:
        """Stop the thread after its current step; requests in progress can still be driven by hand."""
        self._end_thread()
        self._thread = None
        atexit.unregister(self._end_thread)

    def _end_thread(self, seconds: float | None = None) -> None:
        """Stop and join the thread: one inside C++ at interpreter exit would abort the process (`std::terminate`)."""
        thread, self._stopping = self._thread, True
        if thread is not None:
            self._wake.set()
            thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Return whether requests will be served: the runner is alive, and so is the thread, if there is one."""
        return self.runner.alive and (self._thread is None or self._thread.is_alive())

    def _loop(self) -> None:
        while True:
            self._wake.clear()
            if self._stopping:  # checked after clearing: `stop` sets the flag before the event
                return
            if not self.step():
                self._wake.wait()

    def _turn(self) -> bool:
        self._run_commands()
        if self.pace is not None:
            self.scheduler.shared_tokens = self.pace.tokens
        while plan := self.scheduler.plan(began := time.monotonic()):
            self._flights.append((self.runner.launch(plan), began, sum(len(chunk.tokens) for chunk in plan.chunks)))
        self._tell_ended()
        if not self._flights:
            return False
        flight, began, computed = self._flights.popleft()
        result = self.runner.collect(flight)
        now = time.monotonic()
        if self.pace is not None:
            self.pace.observe(computed, now - max(began, self._collected))
        self._collected = now
        for sequence, tokens, chunk in self.scheduler.commit(result):
            self.generated_tokens += len(tokens)
            stopped = sequence.listener.receive(tokens, chunk, now)
            if sequence.grammar is not None and sequence.grammar.error is not None:
                sequence.listener.error = sequence.grammar.error
                self.scheduler.finish(sequence, "error")
            elif stopped or (sequence.grammar is not None and sequence.grammar.finished):
                self._stop(sequence)
        self._tell_ended()
        return True

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _tell_ended(self) -> None:
        ended, self.scheduler.ended = self.scheduler.ended, []
        for sequence in ended:
            if not sequence.listener.finished:
                sequence.listener.end(sequence.finish_reason, time.monotonic())

    def _stop(self, sequence: Sequence) -> None:
        """Finish with reason "stop", which takes precedence over "length"."""
        if sequence.finish_reason is not None:
            sequence.finish_reason = "stop"
        self.scheduler.finish(sequence, "stop")

    def _fail(self, error: BaseException) -> None:
        """Recover from a failed step: end the sequence that caused it, found by rerunning each alone."""
        self.failures += 1
        self.last_error = error
        self._flights.clear()
        if isinstance(error, Exception) and self.runner.alive:
            culprits = [culprit] if (culprit := self.scheduler.isolate()) else []
            self.failed_alone += not self.scheduler.suspects  # one sequence, or the loop itself
            for sequence in self.scheduler.suspects:
                if sequence.grammar is not None:
                    sequence.grammar.rewind(sequence.tokens[sequence.prompt_length :])
        else:
            culprits = self.scheduler.abandon()
        for sequence in culprits:
            sequence.listener.error = error
            self.scheduler.finish(sequence, "error")
        self._tell_ended()

    def _cancel_now(self, generation: Generation) -> None:
        for stream in generation.streams:
            self.scheduler.finish(stream.sequence, "cancelled")

    def _enqueue(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _text(self, tokens: list[int], params: SamplingParams) -> TextStream:
        if self.tokenizer is None:
            return TextStream(None)
        start = self.tokenizer.decode(tokens) if params.echo else ""
        skip_ids = {*params.stop_token_ids, *self.eos}
        return TextStream(self.tokenizer.stream(continues=bool(tokens)), params.stop, skip_ids, start)

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        vocabulary = self.runner.model.config.vocab_size
        for name, ids in (("prompt", tokens), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise InputError(f"{name} has token id {wrong}, but the vocabulary has {vocabulary} tokens")
        if params.min_tokens and params.constrained:
            raise InputError("min_tokens cannot be given with a grammar, which says itself when the text may end")
        wrong = next((token for token in params.logit_bias or () if token >= vocabulary), None)
        if wrong is not None:
            raise InputError(f"logit_bias has token id {wrong}, but the vocabulary has {vocabulary} tokens")
        if params.stop and self.tokenizer is None:
            raise InputError("stop needs a tokenizer, and this model has none; use stop_token_ids")


def _nth_seed(seed: int, index: int) -> int:
    """Seed of the index-th continuation; the first has the request's own."""
    mixed = (seed + index * _GOLDEN) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed
