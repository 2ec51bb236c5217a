"""Beam search on the scheduler's sequences, with pages shared copy-on-write.

Every beam is a sequence of the scheduler whose tokens are chosen here instead of sampled. In each round all beams
report the best next tokens and their log-probabilities; of all extensions the best survive. A beam that survives more
than once is forked: the copies share its pages until they write. A beam that ends is set aside with its score, the sum
of its log-probabilities divided by its length to the power of `length_penalty`.
"""

from __future__ import annotations

import math
import time

from ..errors import InputError
from .engine import Engine
from .outputs import EngineError, Metrics, Output
from .sampling_params import SamplingParams
from .scheduling.sequence import Sequence
from .scheduling.step import ChunkResult


class _Beam:
    """Listener of a beam's sequence: records the log-probabilities of its next token."""

    finished = False
    error: Exception | None = None

    def __init__(self, score: float):
        self.score = score
        self.best: tuple[tuple[int, float], ...] = ()

    def receive(self, tokens: tuple[int, ...], result: ChunkResult, now: float) -> bool:
        if result.logprobs:
            self.best = result.logprobs[0].top
        return False

    def end(self, reason: str, now: float) -> None:
        self.finished = True


def beam_search(engine: Engine, prompt: list[int], width: int, max_tokens: int, length_penalty: float) -> list[Output]:
    """Beam search: up to `width` continuations of the prompt, best first."""
    if not 1 <= width <= 50:
        raise InputError(f"beam_width must be between 1 and 50, got {width}")
    if width > engine.scheduler.max_batch:
        raise InputError(f"beam_width={width} is more than max_batch={engine.scheduler.max_batch}")
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    params = SamplingParams(temperature=0, logprobs=2 * width, max_tokens=max_tokens)
    limit = engine.scheduler.fit(len(prompt), max_tokens)
    root = Sequence(list(prompt), len(prompt), params, max_tokens=limit, manual=True, listener=_Beam(0.0))
    root.arrival = time.monotonic()
    search = _Search(engine, root, width, length_penalty)
    try:
        for length in range(1, limit + 1):
            engine.drive(lambda: all(beam.listener.best or beam.finish_reason for beam in search.beams))
            if not engine.call(lambda last=length == limit: search.advance(last)):
                break
    finally:
        engine.call(search.end)
    return [_output(engine, entry, root) for entry in search.ranking()]


class _Search:
    """State of a search: the open beams, and the finished ones as (score, tokens, finish reason)."""

    def __init__(self, engine, root: Sequence, width: int, length_penalty: float):
        self.scheduler, self.eos, self.width, self.length_penalty = engine.scheduler, engine.eos, width, length_penalty
        self.start, self.beams = root.prompt_length, [root]
        self.ended: list[tuple[float, tuple[int, ...], str]] = []
        engine.call(lambda: self.scheduler.add(root))

    def advance(self, last: bool) -> bool:
        """Extend the best beams by one token; False when no beam can improve the result."""
        error = next((beam.listener.error for beam in self.beams if beam.finish_reason), None)
        if any(beam.finish_reason for beam in self.beams):
            raise EngineError(f"the engine failed while computing a beam: {error}") from error
        candidates = [
            (beam.listener.score + value, beam, token) for beam in self.beams for token, value in beam.listener.best
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        for score, beam, token in candidates[: self.width]:
            if token in self.eos or last:
                self._set_aside(score, beam, token)
        going = [candidate for candidate in candidates if candidate[2] not in self.eos][: self.width]
        if last or not going or self._settled(going[0]):
            return False
        self._extend(going)
        return True

    def ranking(self) -> list[tuple[float, tuple[int, ...], str]]:
        """Finished continuations, best first."""
        return sorted(self.ended, key=lambda entry: -entry[0])[: self.width]

    def end(self) -> None:
        """End all beams and release their pages."""
        for beam in self.beams:
            self.scheduler.finish(beam, "cancelled")

    def _set_aside(self, score: float, beam: Sequence, token: int) -> None:
        tokens = (*beam.tokens[self.start :], token)
        reason = "stop" if token in self.eos else "length"
        self.ended.append((self._score(score, len(tokens)), tokens, reason))

    def _settled(self, best: tuple[float, Sequence, int]) -> bool:
        """Return whether enough have finished with scores that the best open beam cannot reach."""
        worst = self.ranking()[-1][0] if len(self.ended) >= self.width else -math.inf
        return self._score(best[0], len(best[1].tokens) - self.start + 1) <= worst

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self.length_penalty

    def _extend(self, going: list[tuple[float, Sequence, int]]) -> None:
        parents = {beam for _, beam, _ in going}
        for beam in self.beams:
            if beam not in parents:
                self.scheduler.finish(beam, "cancelled")
        grown = []
        for score, beam, token in going:  # fork everything before anything grows
            first = beam in parents
            parents.discard(beam)
            grown.append((beam if first else self.scheduler.fork(beam, _Beam(score)), score, token))
        for beam, score, token in grown:
            beam.tokens.append(token)
            beam.listener.score, beam.listener.best = score, ()
        self.beams = [beam for beam, _, _ in grown]


def _output(engine: Engine, entry: tuple[float, tuple[int, ...], str], root: Sequence) -> Output:
    _, tokens, reason = entry
    metrics = Metrics(root.arrival, finished=time.monotonic(), generated_tokens=len(tokens))
    shown = [token for token in tokens if token not in engine.eos]
    text = engine.tokenizer.decode(shown) if engine.tokenizer else ""
    return Output(text, tokens, reason, tuple(root.tokens[: root.prompt_length]), metrics=metrics)
