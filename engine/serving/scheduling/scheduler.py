"""Scheduler: continuous batching with chunked prefill, preemption and prefix sharing.

Chunked prefill, as in vLLM's V1 scheduler: there is no prefill phase and no decode phase. Every sequence has some
tokens, and of those some are *computed* (their keys and values lie in pages). A step is a set of chunks `{sequence: how
many more tokens to compute}` under one budget of tokens: a decoding sequence asks for one, a fresh prompt for as many
as the budget still allows. A chunk that reaches a sequence's last token also samples the next one.

`plan()` says what to compute, `commit()` learns what came out; between the two, the runner works. Up to `depth` plans
may be under way at once: a plan made before the tokens of the one before are read writes UNKNOWN for them, and the
device fills them in.

The order is one number fixed on arrival: `arrival + priority * patience`. A request of a worse priority is treated as
if it had come later, so nobody starves. Decoding sequences come before prompts, then the order decides. When the pool
is empty, the running sequence that loses the least work is preempted: its pages are freed and computed again later,
from the prefix cache as far as that reaches. The first in order is never preempted, and it always fits (what could
never fit was refused on arrival), so every step makes progress. A sequence is admitted only when there are pages for
all its tokens, and not in a step that had to preempt: no thrashing.

Pure Python; knows no torch, no text and no model.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from ...errors import InputError
from .pace import LEAST
from .page_pool import PagePool
from .sequence import Order, Sequence
from .step import UNKNOWN, Chunk, ChunkResult, NewRow, StepPlan, StepResult

Draft = Callable[[Sequence, int], list[int]]
Event = tuple[Sequence, tuple[int, ...], ChunkResult]


@dataclass(slots=True)
class _Share:
    """Part of one sequence in the step being planned."""

    chunk: Chunk
    copies: list[tuple[int, int]]
    admission: NewRow | None
    epoch: int


class Scheduler:
    """Continuous-batching scheduler. `draft(sequence, most)` may propose tokens for speculative decoding."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch: int = 64,
        max_batch_tokens: int = 512,
        context: int = 1 << 30,
        patience: float = 30.0,
        depth: int = 1,
        draft: Draft | None = None,
        most_drafts: int = 4,
    ):
        if max_batch < 1 or max_batch_tokens < max_batch:
            raise InputError(
                f"max_batch_tokens must be at least max_batch, and that 1; got {max_batch_tokens} and {max_batch}"
            )
        self.pool = pool
        self.max_batch, self.max_batch_tokens, self.context = max_batch, max_batch_tokens, context
        self.shared_tokens = max_batch_tokens  # token budget of steps in which a sequence decodes
        self.patience, self.depth, self.draft, self.most_drafts = patience, depth, draft, most_drafts
        self.running: list[Sequence] = []
        self.ended: list[Sequence] = []  # until the engine reads and clears it
        self.preemptions = self.drafted = self.accepted_drafts = 0
        self._waiting: list[tuple[Order, Sequence]] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._rows = list(range(max_batch - 1, -1, -1))
        self._flights: deque[dict[Sequence, _Share]] = deque()
        self._arrivals = count()
        self._suspects: list[Sequence] = []  # sequences of a failed step; the last one is being run alone

    @property
    def waiting(self) -> list[Sequence]:
        """Queued sequences, which have no pages or row yet, in no particular order."""
        return [sequence for _, sequence in self._waiting if sequence.finish_reason is None]

    @property
    def idle(self) -> bool:
        """Return whether there is nothing to plan and no step in flight."""
        return not self.running and not self._flights and all(sequence.finish_reason for _, sequence in self._waiting)

    def fit(self, prompt_length: int, max_tokens: int) -> int:
        """Return how many tokens can be generated at most; refuse requests that could never be served."""
        if prompt_length < 1:
            raise InputError("the prompt is empty: it must have at least 1 token")
        if prompt_length + min(max_tokens, 1) > self.context:
            raise InputError(f"the prompt has {prompt_length} tokens, too many for a context of {self.context} tokens")
        max_tokens = min(max_tokens, self.context - prompt_length)
        needed = self.pool.pages_for(prompt_length + max(max_tokens - 1, 0))
        if needed > self.pool.num_pages:
            raise InputError(
                f"a prompt of {prompt_length} tokens with max_tokens={max_tokens} needs {needed} pages "
                f"of {self.pool.page_size} tokens and the pool has {self.pool.num_pages}: lower it or raise kv_memory"
            )
        return max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its followers (same prompt, `n` > 1) start when its prompt is computed."""
        family = (sequence, *sequence.followers)
        for member in family:
            member.max_tokens = self.fit(member.prompt_length, member.max_tokens)
        for member in family:
            member.order = (member.arrival + member.priority * self.patience, next(self._arrivals))
            member.leader = None if member is sequence else sequence
            if member.deadline is not None:
                heapq.heappush(self._deadlines, (member.deadline, member.order[1], member))
        self._queue(sequence)

    def fork(self, parent: Sequence, listener: object = None) -> Sequence:
        """Copy a sequence, sharing its pages copy-on-write; without a free row the copy is queued."""
        assert not parent.pending, "only a sequence whose tokens are all read can be forked"
        child = parent.copy(listener)
        child.order = (parent.order[0], next(self._arrivals))
        if not parent.running or not self._rows:
            self._queue(child)
            return child
        child.computed, child.published, child.chain = parent.computed, parent.published, parent.chain
        child.pages = list(parent.pages)
        self.pool.retain(child.pages)
        child.row = self._rows.pop()
        self.running.append(child)
        return child

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence in any state; its pages are free at once."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.running:
            self._leave(sequence)
        self.ended.append(sequence)
        self._call_followers(sequence)

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """Plan the next step; None if there is nothing to compute, or nothing before the next commit."""
        while self._deadlines and self._deadlines[0][0] <= now:
            self.finish(heapq.heappop(self._deadlines)[2], "cancelled")
        while self._suspects and self._suspects[-1].finish_reason is not None:
            self._suspects.pop()
        if len(self._flights) >= (1 if self._suspects else self.depth):
            return None
        if self._suspects:
            return self._launched(self._try_alone(self._suspects[-1]))
        step: dict[Sequence, _Share] = {}
        budget, preempted = self.max_batch_tokens, self.preemptions
        if decoding := sum(sequence.uncomputed <= 1 for sequence in self.running):
            budget = min(budget, max(self.shared_tokens, decoding + LEAST))
        for sequence in sorted(self.running, key=lambda sequence: (sequence.uncomputed > 1, sequence.order)):
            if budget and sequence.running:
                budget -= self._advance(sequence, budget, step)
        if self.preemptions == preempted:
            self._admit(budget, step)
        return self._launched(step)

    def _launched(self, step: dict[Sequence, _Share]) -> StepPlan | None:
        """Make the plan of a step and mark it as in flight."""
        if not step:
            return None
        self._flights.append(step)
        shares = step.values()
        return StepPlan(
            tuple(share.chunk for share in shares),
            tuple(share.admission for share in shares if share.admission),
            tuple(copy for share in shares for copy in share.copies),
        )

    def commit(self, result: StepResult) -> list[Event]:
        """Apply the result of the oldest plan: new tokens, finished sequences (in `ended`), published pages."""
        flight = self._flights.popleft()
        assert len(flight) == len(result.chunks), "a result must answer every chunk of its plan"
        return [
            (sequence, self._append_tokens(sequence, share, chunk), chunk)
            for (sequence, share), chunk in zip(flight.items(), result.chunks)
            if sequence.finish_reason is None
        ]

    def abandon(self) -> list[Sequence]:
        """Drop all plans in flight, whose results will not come; return their sequences."""
        involved = {sequence: None for flight in self._flights for sequence in flight}
        self._flights.clear()
        return [sequence for sequence in involved if sequence.finish_reason is None]

    def isolate(self) -> Sequence | None:
        """After a failed step: preempt its sequences, to rerun each alone, the newest first.

        Returns the culprit if it was alone already; the rest are no longer suspects until they fail again.
        """
        involved = self.abandon()
        for sequence in involved:
            sequence.pending = 0
            if sequence.running:
                self._preempt(sequence)
        self._suspects = sorted(involved, key=lambda sequence: sequence.order) if len(involved) > 1 else []
        return None if self._suspects else (involved or [None])[0]

    @property
    def suspects(self) -> tuple[Sequence, ...]:
        """Sequences of a failed step that have not yet run alone successfully."""
        return tuple(self._suspects)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        self.pool.check([sequence.pages for sequence in self.running])
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self._rows) == list(range(self.max_batch)), "a row was lost or given twice"
        assert not any(sequence.finish_reason for sequence in self.running)
        assert not any(sequence.running or sequence.pages for sequence in self.waiting)
        for sequence in self.running:
            assert self.pool.pages_for(sequence.computed) <= len(sequence.pages)
            assert 0 <= sequence.computed <= sequence.capacity

    def _try_alone(self, suspect: Sequence) -> dict[Sequence, _Share]:
        """Step of a single suspect, which gets all the pages it needs; empty if it waits for its owner (beams)."""
        step: dict[Sequence, _Share] = {}
        while suspect.uncomputed > 0 or not suspect.running:
            if not suspect.running:
                self._waiting.remove((suspect.order, suspect))
                heapq.heapify(self._waiting)
                while not self._rows or not self._try_admit(suspect, step):
                    self._preempt(next(other for other in self.running if other is not suspect))
            if self._advance(suspect, self.max_batch_tokens, step):
                return step
            for other in [other for other in self.running if other is not suspect]:
                self._preempt(other)
        self._suspects.pop()
        return step

    def _advance(self, sequence: Sequence, budget: int, step: dict[Sequence, _Share]) -> int:
        """Add a running sequence to the step, within budget and pages; return its number of tokens."""
        wanted = min(sequence.uncomputed, budget)
        if wanted <= 0 or (sequence.grammar is not None and sequence.pending):  # a grammar must see the token first
            return 0
        tokens = self._tokens(sequence, wanted)
        tokens += self._drafts(sequence, wanted, budget - wanted)
        start, end = sequence.computed, sequence.computed + len(tokens)
        copies = self._make_room(sequence, start, end, step)
        if copies is None:
            return 0
        reaches_end = start + wanted == sequence.length and (
            sequence.manual or sequence.generated < sequence.max_tokens
        )
        sampled = 1 + len(tokens) - wanted if reaches_end else 0
        pages = tuple(sequence.pages[sequence.sent_pages :])
        chunk = Chunk(sequence.row, start, tokens, sampled, sequence.sent_pages, pages)
        admission = None if sequence.announced else self._announce(sequence)
        step[sequence] = _Share(chunk, copies, admission, sequence.preemptions)
        sequence.sent_pages = len(sequence.pages)
        sequence.computed = end
        sequence.pending += sampled > 0
        return len(tokens)

    def _tokens(self, sequence: Sequence, wanted: int) -> tuple[int, ...]:
        start = sequence.computed
        tokens = tuple(sequence.tokens[start : start + wanted])
        return tokens + (UNKNOWN,) * (wanted - len(tokens))

    def _drafts(self, sequence: Sequence, wanted: int, budget: int) -> tuple[int, ...]:
        """Draft tokens for speculative decoding, if the step has budget and pages to spare."""
        bound = sequence.grammar is not None and sequence.grammar.active
        if self.draft is None or self.depth > 1 or sequence.manual or bound:
            return ()
        room = (len(sequence.pages) + self.pool.num_free) * self.pool.page_size
        most = min(self.most_drafts, min(sequence.capacity, room) - sequence.length, budget - len(self.running))
        decoding = wanted == sequence.uncomputed and sequence.generated > 0
        return tuple(self.draft(sequence, most)) if decoding and most > 0 else ()

    def _make_room(self, sequence: Sequence, start: int, end: int, step: dict[Sequence, _Share]) -> list | None:
        """Allocate private pages for positions start to end, with copy-on-write; None if the sequence was preempted."""
        copies = []
        size = self.pool.page_size
        for index in range(start // size, self.pool.pages_for(end)):
            new = index == len(sequence.pages)
            if not new and self.pool.make_writable(sequence.pages[index]):
                continue
            page = self._take_page(sequence, step)
            if page is None:
                return None
            if new:
                sequence.pages.append(page)
                continue
            if index * size < start:
                copies.append((sequence.pages[index], page))
            self.pool.release([sequence.pages[index]])
            sequence.pages[index] = page
            sequence.sent_pages = min(sequence.sent_pages, index)
        return copies

    def _take_page(self, sequence: Sequence, step: dict[Sequence, _Share]) -> int | None:
        """Allocate a page, preempting the sequence that loses the least work if need be; None if that is this one."""
        while (page := self.pool.allocate()) is None:
            first = min(self.running, key=lambda other: other.order)
            victim = min((other for other in self.running if other is not first), key=lambda other: other.computed)
            if share := step.pop(victim, None):
                victim.pending -= share.chunk.sampled > 0
            self._preempt(victim)
            if victim is sequence:
                return None
        return page

    def _admit(self, budget: int, step: dict[Sequence, _Share]) -> None:
        """Admit waiting sequences, strictly in order, while rows, pages and budget last."""
        while self._waiting and self._rows and budget:
            _, sequence = self._waiting[0]
            if sequence.finish_reason is not None:
                heapq.heappop(self._waiting)
                continue
            if sequence.pending or not self._try_admit(sequence, step):
                if step or self._flights or not self._preempt_held():
                    return
                continue
            heapq.heappop(self._waiting)
            budget -= self._advance(sequence, budget, step)

    def _try_admit(self, sequence: Sequence, step: dict[Sequence, _Share]) -> bool:
        """Give a waiting sequence a row and pages, cached prefix pages first; False if there are too few."""
        pool, length = self.pool, sequence.length
        pages, chain = pool.match(sequence.tokens[: length - 1], sequence.salt) if sequence.use_cache else ([], None)
        published, computed = len(pages), len(pages) * pool.page_size
        leader, rest = sequence.leader, length - 1 - computed
        if not sequence.generated and leader and 0 < rest < pool.page_size and _computed_before(leader, step) >= length:
            pages.append(leader.pages[published])
            pool.retain(pages[-1:])
            computed = length - 1
        room = max(length, min(length + 1, sequence.capacity))
        shared_tail = len(pages) > published
        if pool.pages_for(room) - len(pages) + shared_tail > pool.num_free:
            pool.release(pages)
            return False
        pages += [pool.allocate() for _ in range(pool.pages_for(length) - len(pages))]
        sequence.pages, sequence.computed, sequence.cached_tokens = pages, computed, computed
        sequence.published, sequence.chain = published, chain if sequence.use_cache else pool.root(sequence.salt)
        sequence.row = self._rows.pop()
        self.running.append(sequence)
        return True

    def _append_tokens(self, sequence: Sequence, share: _Share, result: ChunkResult) -> tuple[int, ...]:
        """Append sampled tokens up to the one that ends the sequence; return the new ones."""
        chunk, sampled = share.chunk, result.tokens
        room = sequence.max_tokens - (len(sequence.tokens) - sequence.prompt_length)
        ends = [i + 1 for i, token in enumerate(sampled) if token in sequence.stop_tokens]
        new = () if sequence.manual else sampled[: min([room, *ends])]
        sequence.tokens += new
        sequence.pending -= chunk.sampled > 0
        if chunk.sampled and sequence in self._suspects:
            self._suspects.remove(sequence)
        for counter in (self, sequence):
            counter.drafted += max(chunk.sampled - 1, 0)
            counter.accepted_drafts += max(len(sampled) - 1, 0)
        if sequence.running and sequence.preemptions == share.epoch:
            wasted = chunk.sampled - len(sampled)  # drafts that were wrong
            sequence.computed -= wasted
            self._publish(sequence, min(chunk.start + len(chunk.tokens) - wasted, len(sequence.tokens)))
        if sequence.computed >= sequence.prompt_length:
            self._call_followers(sequence)
        if new and new[-1] in sequence.stop_tokens:
            self.finish(sequence, "stop")
        elif not sequence.manual and room <= len(new) and (new or sequence.uncomputed <= 0):
            self.finish(sequence, "length")
        return new

    def _publish(self, sequence: Sequence, valid: int) -> None:
        while (sequence.published + 1) * self.pool.page_size <= valid:
            page = sequence.pages[sequence.published]
            sequence.chain = self.pool.publish(page, sequence.chain, sequence.tokens, sequence.published)
            sequence.published += 1

    def _announce(self, sequence: Sequence) -> NewRow:
        sequence.announced = True
        tokens = tuple(sequence.tokens)
        given = sequence.params, sequence.seed, tokens, sequence.prompt_length, sequence.grammar, sequence.adapter
        return NewRow(sequence.row, *given, sequence.pooling)

    def _queue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _call_followers(self, sequence: Sequence) -> None:
        followers, sequence.followers = sequence.followers, ()
        for follower in followers:
            if follower.finish_reason is None:
                self._queue(follower)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._leave(sequence)
        self._queue(sequence)

    def _preempt_held(self) -> bool:
        """Preempt a sequence that waits for its owner's choice (beams), so that others can advance."""
        held = next((sequence for sequence in self.running if sequence.uncomputed <= 0), None)
        if held:
            self._preempt(held)
        return held is not None

    def _leave(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row, sequence.announced = -1, False
        sequence.pages, sequence.sent_pages = [], 0
        sequence.computed = sequence.published = 0
        sequence.chain = None


def _computed_before(sequence: Sequence, step: dict[Sequence, _Share]) -> int:
    """Number of the sequence's tokens in the KV cache before the step being planned."""
    return step[sequence].chunk.start if sequence in step else sequence.computed
