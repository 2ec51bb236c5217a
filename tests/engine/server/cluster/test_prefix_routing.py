"""Where requests go when there are replicas; no replica and no Ray is needed to know."""

import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.engine.server.cluster.prefix_routing import Affinity, prefix_hashes

NAMES = tuple("abcdefgh")
loads = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50), min_size=1)
texts = st.text(min_size=1, max_size=400)


def chain(text, salt=None):
    return prefix_hashes(json.dumps({"prompt": text}).encode(), salt)


@given(st.lists(st.tuples(texts, loads), max_size=20))
def test_router_first_choice_bounded_load(asks):
    """Nobody is first choice beyond a quarter more than its share."""
    affinity = Affinity()
    for text, load in asks:
        order = affinity.rank(chain(text), load)
        assert sorted(order) == sorted(load), "everybody is in the list, once"
        mean = (sum(load.values()) + 1) / len(load)
        assert load[order[0]] < max(4, -(-5 * mean // 4))
        affinity.remember(chain(text), order[0])


@given(texts, texts, st.sets(st.sampled_from(NAMES), min_size=2))
def test_router_longer_conversation_same_replica(text, more, names):
    """A longer conversation goes where its beginning went."""
    affinity, idle = Affinity(), dict.fromkeys(names, 0)
    text = text * (64 // len(text) + 1)
    for served in sorted(names):
        affinity = Affinity()
        affinity.remember(chain(text), served)
        assert affinity.rank(chain(text + more), idle)[0] == served


@given(texts, st.sets(st.sampled_from(NAMES), min_size=2), st.data())
def test_when_a_replica_goes_only_its_own_prompts_move(text, names, data):
    gone = data.draw(st.sampled_from(sorted(names)))
    affinity = Affinity()
    before = affinity.rank(chain(text), dict.fromkeys(names, 0))
    after = affinity.rank(chain(text), dict.fromkeys(names - {gone}, 0))
    assert after == [name for name in before if name != gone]


def test_router_spreads_evenly_popular_too():
    """Prompts that share nothing spread evenly and one popular beginning does too."""
    affinity, idle = Affinity(), dict.fromkeys("abcd", 0)
    firsts = Counter(affinity.rank(chain(str(number)), idle)[0] for number in range(2000))
    assert min(firsts.values()) > 350
    busy = dict.fromkeys("abcd", 0)
    for number in range(100):
        beginning = "the same system prompt for everybody " * 10
        name = affinity.rank(chain(beginning + str(number)), busy)[0]
        affinity.remember(chain(beginning + str(number)), name)
        busy[name] += 1
    assert max(busy.values()) <= 32, "100 requests under way at four replicas: 25 each, and a quarter"


def test_router_busy_replica_hands_over():
    """A busy replica hands over and the next one has that beginning too."""
    affinity, text = Affinity(), chain("a long prompt, " * 20)
    affinity.remember(text, "a")
    assert affinity.rank(text, {"a": 1, "b": 0, "c": 0})[0] == "a"
    second = affinity.rank(text, {"a": 9, "b": 0, "c": 0})[0]
    affinity.remember(text, second)
    assert affinity.rank(text, {"a": 9, "b": 1, "c": 1})[0] == second
    third = ({"b", "c"} - {second}).pop()
    assert affinity.rank(text, {"a": 0, third: 0})[0] == "a", "one that is gone is not chosen, whatever it had"


@settings(max_examples=20)
@given(st.lists(texts, max_size=50))
def test_its_memory_is_bounded_and_forgets_the_oldest(prompts):
    affinity = Affinity(remembered=20)
    for prompt in prompts:
        affinity.remember(chain(prompt), "a")
        assert len(affinity._served) <= 20
        assert all(block in affinity._served for block in chain(prompt)[-20:])


def test_prefix_hashes_equal_for_equal_beginnings():
    """Equal beginnings are equal chains whatever the route and keys share none."""

    def same(one, other):
        shared = [
            a == b for a, b in zip(prefix_hashes(json.dumps(one).encode()), prefix_hashes(json.dumps(other).encode()))
        ]
        return shared.index(False) if False in shared else len(shared)

    talk = [{"role": "system", "content": "x" * 300}, {"role": "user", "content": "hello"}]
    assert same({"messages": talk}, {"messages": [*talk, {"role": "assistant", "content": "yes"}]}) >= 5
    assert same({"idx": [[*range(64)]]}, {"prompt": [*range(60), 9, 9, 9, 9]}) == 3
    assert same({"prompt": ["y" * 128, "z"]}, {"prompt": "y" * 128}) == 2
    assert chain("x" * 64, b"one key") != chain("x" * 64, b"another")
    for nothing in (b"", b"{", b"[1]", b'{"prompt": 7}', b"\xff", b"[" * 100_000):
        assert prefix_hashes(nothing) == ()
