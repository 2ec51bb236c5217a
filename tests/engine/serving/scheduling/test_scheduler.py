"""Claims about the scheduler, proved with a runner whose model sees nothing but the pages it is given."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from warploom.engine.serving.scheduling.page_pool import PagePool
from warploom.engine.serving.scheduling.scheduler import Scheduler
from warploom.engine.serving.scheduling.sequence import Sequence
from warploom.engine.serving.scheduling.step import UNKNOWN, ChunkResult, StepResult

VOCAB = 7


def next_token(tokens, seed) -> int:
    """The model: any function of all the tokens before."""
    return hash((seed, tuple(tokens))) % VOCAB


def continuation(prompt, max_tokens, seed, stop=frozenset()) -> list[int]:
    """What a sequence must become, by the model alone."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, seed))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class PageReader:
    """A runner that writes tokens into pages and reads them back through the page table."""

    def __init__(self, num_pages, page_size):
        self.memory = [[None] * page_size for _ in range(num_pages)]
        self.page_size = page_size
        self.tables, self.seeds, self.last = {}, {}, {}

    def run(self, plan) -> StepResult:
        for source, target in plan.copies:
            self.memory[target] = list(self.memory[source])
        for admission in plan.admitted:
            self.tables[admission.row], self.seeds[admission.row] = [], admission.seed
        return StepResult(tuple(self.compute(chunk) for chunk in plan.chunks))

    def compute(self, chunk) -> ChunkResult:
        table = self.tables[chunk.row]
        table[chunk.first_page :] = chunk.pages
        tokens = [self.last[chunk.row] if token == UNKNOWN else token for token in chunk.tokens]
        end = chunk.start + len(tokens)
        for position, token in zip(range(chunk.start, end), tokens):
            self.memory[table[position // self.page_size]][position % self.page_size] = token
        seen = [self.memory[table[i // self.page_size]][i % self.page_size] for i in range(end)]
        sampled = [next_token(seen[: i + 1], self.seeds[chunk.row]) for i in range(end - chunk.sampled, end)]
        if sampled:
            self.last[chunk.row] = sampled[-1]
        drafts = chunk.tokens[len(tokens) - chunk.sampled + 1 :]
        wrong = [i for i, draft in enumerate(drafts) if draft != sampled[i]]
        return ChunkResult(tuple(sampled[: wrong[0] + 1] if wrong else sampled))


def draft(sequence, most):
    """Guesses that are sometimes right."""
    guess = list(sequence.tokens)
    for i in range(min(3, most)):
        guess.append(next_token(guess, sequence.seed) if (len(guess) + i) % 3 else 0)
    return guess[len(sequence.tokens) :]


def drain(scheduler, runner, steps=10_000):
    for _ in range(steps):
        if (plan := scheduler.plan()) is None:
            break
        scheduler.commit(runner.run(plan))
        scheduler.check()
    assert scheduler.idle


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=9),  # prompt
        st.integers(0, 8),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 2),  # priority
        st.booleans(),  # stops at token 0
        st.integers(0, 3),  # comes after so many steps
        st.one_of(st.none(), st.integers(0, 12)),  # is cancelled after so many
        st.one_of(st.none(), st.integers(0, 20)),  # has a deadline
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=250)
@given(
    requests, st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.integers(0, 8), st.sampled_from([1, 2, 3])
)
def test_scheduler_any_order_equals_model_alone(asked, num_pages, page_size, max_batch, extra_budget, depth):
    """Whatever comes and goes every sequence gets what the model alone would say."""
    pool = PagePool(num_pages, page_size)
    scheduler = Scheduler(
        pool,
        max_batch=max_batch,
        max_batch_tokens=max_batch + extra_budget,
        context=16,
        patience=5,
        depth=depth,
        draft=draft,
    )
    runner = PageReader(num_pages, page_size)
    members, arrivals, cancels, flights = [], {}, {}, []
    for number, (prompt, max_tokens, n, priority, stops, arrival, cancel, deadline) in enumerate(asked):
        family = [
            Sequence(list(prompt), len(prompt), seed=10 * number + i, max_tokens=max_tokens, priority=priority)
            for i in range(n)
        ]
        for member in family:
            member.arrival, member.deadline = arrival, deadline
            member.stop_tokens = frozenset([0]) if stops else frozenset()
        family[0].followers = tuple(family[1:])
        arrivals.setdefault(arrival, []).append(family)
        cancels.setdefault(cancel, []).append(family)
    for now in range(2000):
        for family in arrivals.pop(now, ()):
            try:
                scheduler.add(family[0])
                members += family
            except ValueError as refusal:
                assert str(num_pages) in str(refusal)
        for family in cancels.pop(now, ()):
            for member in family:
                if member in members:
                    scheduler.finish(member, "cancelled")
        while plan := scheduler.plan(now):
            assert sum(len(chunk.tokens) for chunk in plan.chunks) <= scheduler.max_batch_tokens
            flights.append(runner.run(plan))
            scheduler.check()
        if flights:
            scheduler.commit(flights.pop(0))
            scheduler.check()
        elif not arrivals and scheduler.idle:
            break
    assert not scheduler.running and not scheduler.waiting, "something starved"
    assert pool.num_free == num_pages, "a page leaked"
    for member in members:
        full = continuation(member.tokens[: member.prompt_length], member.max_tokens, member.seed, member.stop_tokens)
        said = member.tokens[member.prompt_length :]
        assert said == full[: len(said)]
        if member.finish_reason == "cancelled":
            continue
        assert said == full
        assert member.finish_reason == ("stop" if said and said[-1] in member.stop_tokens else "length")
    assert {id(member) for member in scheduler.ended} == {id(member) for member in members}


def test_followers_share_the_pages_of_the_prompt():
    pool = PagePool(100, page_size=4)
    scheduler = Scheduler(pool, max_batch=8, max_batch_tokens=64)
    family = [Sequence(list(range(30)), 30, seed=i, max_tokens=5) for i in range(4)]
    family[0].followers = tuple(family[1:])
    scheduler.add(family[0])
    runner = PageReader(100, 4)
    scheduler.commit(runner.run(scheduler.plan()))
    plan = scheduler.plan()
    assert [len(chunk.tokens) for chunk in plan.chunks] == [1, 1, 1, 1], "only the last prompt token is computed again"
    assert 100 - pool.num_free == 7 + 4, "seven full pages are shared, each has a tail of its own"
    scheduler.commit(runner.run(plan))
    drain(scheduler, runner)


def test_preemption_takes_least_work_loses_none():
    """The running sequence with the least work is preempted and nothing is lost."""
    pool = PagePool(10, page_size=2)
    scheduler = Scheduler(pool, max_batch=4, max_batch_tokens=64)
    runner = PageReader(10, 2)
    sequences = [Sequence([i] * length, length, seed=i, max_tokens=6) for i, length in enumerate([4, 5, 2])]
    for sequence in sequences:
        scheduler.add(sequence)
    drain(scheduler, runner)
    assert [sequence.preemptions > 0 for sequence in sequences] == [False, False, True]
    assert all(s.tokens[s.prompt_length :] == continuation(s.tokens[: s.prompt_length], 6, s.seed) for s in sequences)


def test_scheduler_long_prompt_is_chunked():
    """A long prompt is computed in chunks while others go on."""
    scheduler = Scheduler(PagePool(100, 4), max_batch=4, max_batch_tokens=8)
    runner = PageReader(100, 4)
    short, long = Sequence([1], 1, max_tokens=50), Sequence(list(range(40)), 40, max_tokens=1)
    scheduler.add(short)
    scheduler.commit(runner.run(scheduler.plan()))
    scheduler.add(long)
    sizes = []
    while long.finish_reason is None:
        plan = scheduler.plan()
        sizes.append([len(chunk.tokens) for chunk in plan.chunks])
        scheduler.commit(runner.run(plan))
    assert sizes == [[1, 7]] * 5 + [[1, 5]]


def test_priority_first_but_none_starves():
    """Priority is served first but patience lets nobody starve."""
    scheduler = Scheduler(PagePool(100), max_batch=1, max_batch_tokens=8, patience=10)
    runner = PageReader(100, 16)
    low = Sequence([1], 1, max_tokens=1, priority=1, arrival=0)
    urgent = [Sequence([2], 1, max_tokens=1, priority=0, arrival=float(time)) for time in range(20)]
    for sequence in [low, *urgent]:
        scheduler.add(sequence)
    drain(scheduler, runner)
    assert scheduler.ended.index(low) == 10


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(PagePool(3, 4), max_batch=1, max_batch_tokens=8, context=32)
    with pytest.raises(ValueError, match="20 tokens with max_tokens=2 needs 6 pages of 4 tokens and the pool has 3"):
        scheduler.add(Sequence([1] * 20, 20, max_tokens=2))
    with pytest.raises(ValueError, match="33 tokens, too many for a context of 32"):
        scheduler.add(Sequence([1] * 33, 33))
    with pytest.raises(ValueError, match="empty"):
        scheduler.add(Sequence([], 0))
    assert scheduler.idle


def test_forks_share_pages_until_they_write():
    pool = PagePool(10, page_size=4)
    scheduler = Scheduler(pool, max_batch=4, max_batch_tokens=16)
    runner = PageReader(10, 4)
    parent = Sequence(list(range(6)), 6, max_tokens=8, manual=True)
    scheduler.add(parent)
    scheduler.commit(runner.run(scheduler.plan()))
    children = [parent, scheduler.fork(parent), scheduler.fork(parent)]
    assert pool.num_free == 8
    for token, child in enumerate(children):
        child.tokens.append(token)
    plan = scheduler.plan()
    assert len(plan.copies) == 2, "the last writer keeps the page"
    events = scheduler.commit(runner.run(plan))
    assert [result.tokens[0] for _, _, result in events] == [next_token([*range(6), i], 0) for i in range(3)]
    for child in children:
        scheduler.finish(child, "stop")
    scheduler.check()
    assert pool.num_free == 10
