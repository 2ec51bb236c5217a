"""Outputs: streamed `Piece`s, and an `Output` at the end."""

from dataclasses import dataclass, field

from .scheduling.step import TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """Increment of a stream: new text and new tokens."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None  # set in the last piece
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0  # index of the continuation, below `n`


@dataclass(slots=True)
class Metrics:
    """Timestamps (one monotonic clock, in seconds) and durations of a request."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    seed: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0  # tokens guessed ahead and checked
    accepted_drafts: int = 0  # accepted draft tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the tokens after the first."""
        if self.generated_tokens < 2 or self.first_token is None or self.finished is None:
            return None
        seconds = self.finished - self.first_token
        return (self.generated_tokens - 1) / seconds if seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Output:
    """Result of one continuation; with `n` above 1, the further ones are in `others`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop", "length", "cancelled" or "error"
    prompt_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # from the second token of the prompt on
    metrics: Metrics = field(default_factory=lambda: Metrics(0.0))
    others: tuple["Output", ...] = ()

    @property
    def choices(self) -> tuple["Output", ...]:
        """All `n` continuations, this one first."""
        return (self, *self.others)


class EngineError(RuntimeError):
    """The engine failed while computing a request; other requests continue."""
