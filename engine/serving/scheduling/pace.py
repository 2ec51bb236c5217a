"""Token budget of a step while other requests are decoding.

A long prompt is computed in chunks, and whoever decodes beside it waits for each of them. A step's time is nearly
linear in its tokens, but its slope differs a thousandfold between devices and models: 512 tokens of SmolLM2-135M on two
CPU cores took 2 s, and streams beside an 8,000-token prompt stood still for 3.3 s. So the rate is measured, step by
step, and a chunk is what fits into `SECONDS`. It changes when a prompt is done, and no bit of what is computed.
"""

SECONDS = 0.2
FIRST = 128  # tokens, before anything has been measured
LEAST = 16


class StepPace:
    """Tokens of a step that fit into the time, by the rate of the steps before."""

    def __init__(self, most: int) -> None:
        self.tokens = min(FIRST, most)
        self._most = most
        self._rate: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """Record a step's duration. Small steps are left out: reading the weights is most of their time."""
        if tokens < LEAST or seconds <= 0:
            return
        rate = tokens / seconds
        self._rate = rate if self._rate is None else self._rate + 0.3 * (rate - self._rate)
        self.tokens = max(min(int(self._rate * SECONDS) // LEAST * LEAST, self._most), LEAST)
