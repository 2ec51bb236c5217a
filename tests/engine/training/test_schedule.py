import itertools
import math

import pytest

from warploom.engine.training.schedule import SCHEDULES, cosine_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_peak_end(name):
    """Every schedule starts at zero peaks after warmup and ends where it says."""
    rates = [SCHEDULES[name](step, 1.0, 0.1, 10, 100) for step in range(150)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1.0 == max(rates)
    end = 1.0 if name == "constant" else 0.1
    assert rates[100:] == [end] * 50
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_cosine_follows_its_formula():
    for step in range(10, 101):
        expected = 0.1 + 0.5 * (1 + math.cos((step - 10) / 90 * math.pi)) * 0.9
        assert cosine_schedule(step, 1.0, 0.1, 10, 100) == pytest.approx(expected, abs=1e-12)


def test_wsd_stays_on_its_plateau_until_the_last_fifth():
    assert {SCHEDULES["wsd"](step, 1.0, 0.0, 10, 100) for step in range(10, 81)} == {1.0}
    assert SCHEDULES["wsd"](90, 1.0, 0.0, 10, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_degenerate_lengths_are_no_division_by_zero(name):
    assert SCHEDULES[name](0, 1.0, 0.1, 0, 0) in (0.1, 1.0)
    assert SCHEDULES[name](5, 1.0, 0.1, 5, 5) in (0.1, 1.0)
