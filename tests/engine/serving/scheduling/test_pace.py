"""A step that others wait for holds what the device computes in its time."""

from warploom.engine.serving.scheduling.pace import LEAST, SECONDS, StepPace


def settle(seconds_of, most=512):
    pace = StepPace(most)
    for _ in range(50):
        pace.observe(pace.tokens, seconds_of(pace.tokens))
    return pace.tokens


def test_pace_finds_the_tokens_of_a_step():
    slow = settle(lambda tokens: 0.02 + tokens / 250)
    assert 0.7 * SECONDS < 0.02 + slow / 250 <= SECONDS
    assert settle(lambda tokens: tokens / 1e6) == 512, "a fast device takes all that is allowed"
    assert settle(lambda tokens: 10.0) == LEAST, "a very slow one still makes progress"


def test_pace_ignores_steps_of_decoding():
    pace = StepPace(512)
    first = pace.tokens
    pace.observe(1, 0.05)
    assert pace.tokens == first
