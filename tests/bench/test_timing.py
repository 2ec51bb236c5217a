"""Time is taken fairly: the same turns for everyone, medians and paired ratios that drift cannot bend."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.bench import peers
from warploom.bench.harness import LATE, Machine
from warploom.bench.schema import Spread
from warploom.bench.timing import WallTimer, host_seconds, interleave, order
from warploom.engine.memory import RESET, PeakMemory


class FakeClock:
    """Time that passes only when a workload says so; `drift` makes everything slower as it goes on."""

    def __init__(self, drift: float = 0.0):
        self.now, self.drift, self.log = 0.0, drift, []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def call():
            self.log.append(name)
            self.now += seconds * (1 + self.drift * self.now)

        return call


def machine(clock: FakeClock, **options) -> Machine:
    return Machine("cpu", WallTimer(clock, min_sample=0.0), **options)


@given(st.integers(1, 7))
@settings(max_examples=7)
def test_rotation_gives_every_place_to_everyone(count):
    """Over two rotations everyone has stood twice at every place."""
    names = [f"n{index}" for index in range(count)]
    places = Counter((name, place) for turn in range(2 * count) for place, name in enumerate(order(names, turn)))
    assert places == {(name, place): 2 for name in names for place in range(count)}


def test_two_contestants_go_in_abba_order():
    clock = FakeClock()
    calls = {"a": clock.work("a", 1.0), "b": clock.work("b", 1.0)}
    interleave(calls, WallTimer(clock, min_sample=0.0), rounds=4, seconds=1e9)
    assert "".join(clock.log[2:]) == "abbabaab"


def test_drift_changes_the_times_but_not_the_ratio():
    clock = FakeClock(drift=0.01)
    calls = {"ours": clock.work("o", 1.0), "peer": clock.work("p", 3.0)}
    ours, peer = machine(clock, rounds=8, seconds=1e9).compare("x", calls)
    assert ours.seconds.high > 1.1 * ours.seconds.low
    assert peer.ratio.median == pytest.approx(3.0, rel=0.01)


def test_timing_repeats_short_calls():
    """Short calls are repeated until the clock can see them."""
    clock = FakeClock()
    samples = interleave({"a": clock.work("a", 0.001)}, WallTimer(clock, min_sample=0.01), rounds=2, seconds=1e9)
    assert samples["a"] == pytest.approx([0.001, 0.001])
    assert len(clock.log) == 1 + 2 * 10


def test_comparison_limit_after_three_rounds():
    """The time limit ends a comparison but never before three rounds."""
    for seconds_a_call, expected in ((1.0, 6), (100.0, 3)):
        clock = FakeClock()
        timer = WallTimer(clock, min_sample=0.0)
        samples = interleave({"a": clock.work("a", seconds_a_call)}, timer, rounds=50, seconds=5.5)
        assert len(samples["a"]) == expected


def test_rates_shares_and_first_calls_are_what_they_say():
    clock = FakeClock()
    box = machine(clock)
    box.ceilings["copy"] = 1000.0
    (row,) = box.compare("x", {"ours": clock.work("o", 2.0)}, amount=10, unit="tok", limits={"copy": 500.0})
    assert (row.rate, row.unit, row.limits, row.ratio) == (5.0, "tok", {"copy": 0.25}, None)
    assert row.extra == {"first_seconds": 2.0}


def test_bench_missing_peer_is_row_own_is_error():
    """A missing or failing peer is a row and our own failure an error."""
    clock = FakeClock()

    def broken():
        raise RuntimeError("no such kernel\nlong trace")

    ours = clock.work("o", 1.0)
    contestants = {"ours": ours, "absent": peers.Missing("absent not installed"), "broken": broken}
    rows = {row.who: row for row in machine(clock).compare("x", contestants)}
    assert rows["ours"].seconds.median == 1.0
    assert rows["absent"].missing == "absent not installed"
    assert rows["broken"].missing == "RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such kernel"):
        machine(clock).compare("x", {"ours": broken, "peer": ours})


def test_bench_preparation_timed_peers_forgiven():
    """Preparing notes the time to the first result and forgives peers alone."""
    clock = FakeClock()

    def build():
        clock.now += 5.0
        return clock.work("o", 2.0)

    def impossible():
        raise ValueError("too large")

    calls, extra = machine(clock).prepare({"ours": build, "peer": impossible, "gone": peers.Missing("gone")})
    assert extra["ours"]["first_seconds"] == 7.0
    assert calls["peer"] == peers.Missing("ValueError: too large")
    assert calls["gone"] == peers.Missing("gone")
    with pytest.raises(ValueError, match="too large"):
        machine(clock).prepare({"ours": impossible})


def test_peers_without_time_are_left_out():
    """A slow peer does not cost our own record its slot."""
    clock = FakeClock()
    short = machine(clock)
    short.peers_until = clock.now + 10

    def slow():
        clock.now += 20
        return clock.work("x", 1.0)

    calls, _ = short.prepare({"ours": slow, "peer": slow, "another": slow})
    assert callable(calls["ours"]) and calls["peer"] == calls["another"] == LATE
    rows = short.compare("case", calls | {"late": clock.work("l", 1.0)})
    assert {row.who: row.missing for row in rows if row.missing} == dict.fromkeys(
        ["peer", "another", "late"], "no time was left to begin it"
    )


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
@settings(max_examples=50)
def test_spread_brackets_median(samples):
    """A spread brackets its median and stays within the samples."""
    spread = Spread.of(samples)
    tiny = 1e-9 * max(samples)
    assert min(samples) - tiny <= spread.low <= spread.median + tiny
    assert spread.median - tiny <= spread.high <= max(samples) + tiny
    assert spread.count == len(samples)
    assert 0 <= spread.mad <= max(samples) - min(samples)


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells the peak of resident memory")
def test_peak_memory_is_the_growth_at_the_highest_point():
    with PeakMemory("cpu") as peak:
        block = b"x" * (64 * 2**20)
        del block
    assert 0.9 * 64 * 2**20 < peak.bytes < 1.5 * 64 * 2**20
    with PeakMemory("cpu") as peak:
        pass
    assert peak.bytes < 8 * 2**20


def test_host_seconds_is_the_mean_cost_of_a_call():
    clock = FakeClock()
    assert host_seconds(clock.work("a", 0.25), calls=4, clock=clock) == 0.25
