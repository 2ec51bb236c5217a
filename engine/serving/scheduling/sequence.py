"""Sequence: scheduler state of one continuation of a prompt."""

from dataclasses import dataclass, field
from typing import Any

Order = tuple[float, int]


@dataclass(slots=True, eq=False)
class Sequence:
    """Scheduler state of one continuation. The first fields are given, the others are the scheduler's own."""

    tokens: list[int]
    prompt_length: int
    params: Any = None
    seed: int = 0
    max_tokens: int = 1
    stop_tokens: frozenset[int] = frozenset()
    arrival: float = 0.0
    priority: int = 0  # the smaller, the sooner
    deadline: float | None = None
    salt: Any = None  # sequences of different salt never share pages
    adapter: str | None = None  # sequences of different adapters have different salts
    grammar: Any = None
    listener: Any = None  # whom the engine tells; the scheduler never looks
    use_cache: bool = True
    pooling: str | None = None  # pooling of the prompt's hidden states: mean, last or None
    manual: bool = False  # its owner chooses its tokens and ends it (beams); samples are only reported
    followers: tuple["Sequence", ...] = ()  # the same prompt again: they start when this one has computed it
    leader: "Sequence | None" = None

    order: Order = (0.0, 0)
    row: int = -1  # -1: not running
    announced: bool = False  # whether the runner knows that the row is ours
    pages: list[int] = field(default_factory=list)
    sent_pages: int = 0  # how many of them the runner knows
    computed: int = 0  # tokens whose keys and values are in the pages, or will be by the plans under way
    pending: int = 0  # tokens sampled and not read yet
    published: int = 0  # pages published to the prefix cache
    chain: Any = None  # … and where that chain ends
    cached_tokens: int = 0  # taken from the prefix cache
    preemptions: int = 0
    drafted: int = 0  # guesses that were checked
    accepted_drafts: int = 0
    finish_reason: str | None = None

    @property
    def running(self) -> bool:
        """Return whether it has a row and pages."""
        return self.row >= 0

    @property
    def length(self) -> int:
        """Number of tokens, including sampled ones that the host has not read yet."""
        return len(self.tokens) + self.pending

    @property
    def generated(self) -> int:
        """Number of tokens after the prompt."""
        return self.length - self.prompt_length

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in the KV cache: the last generated one is never computed."""
        return self.prompt_length + max(self.max_tokens - 1, 0)

    @property
    def uncomputed(self) -> int:
        """Number of tokens that could be computed now."""
        return min(self.length, self.capacity) - self.computed

    def copy(self, listener: Any = None) -> "Sequence":
        """Copy for another owner, without pages."""
        return Sequence(
            list(self.tokens),
            self.prompt_length,
            self.params,
            self.seed,
            self.max_tokens,
            self.stop_tokens,
            self.arrival,
            self.priority,
            self.deadline,
            self.salt,
            self.adapter,
            listener=listener,
            manual=self.manual,
        )
