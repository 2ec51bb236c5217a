"""Adaptive token budget (chunked prefill): bounds the time of steps while other requests decode.

A long prompt is computed in chunks, and requests that decode meanwhile wait for each of them. A step's time is nearly
linear in its tokens, but its slope differs a thousandfold between devices and models: 512 tokens of SmolLM2-135M on two
CPU cores took 2 s, and streams beside an 8,000-token prompt stood still for 3.3 s. So the rate is measured, step by
step, and a chunk is what fits into `SECONDS`. It changes when a prompt is done, and no bit of what is computed.
"""

SECONDS = 0.2
FIRST = 128  # tokens, before anything has been measured
LEAST = 16


class StepPace:
    """Token budget that fits a time limit, from the measured rate of earlier steps."""

    def __init__(self, most: int) -> None:
        self.tokens = min(FIRST, most)
        self._most = most
        self._rate: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """Record a step's duration. Small steps are ignored: reading the weights dominates them."""
        if tokens < LEAST or seconds <= 0:
            return
        rate = tokens / seconds
        self._rate = rate if self._rate is None else self._rate + 0.3 * (rate - self._rate)
        self.tokens = max(min(int(self._rate * SECONDS) // LEAST * LEAST, self._most), LEAST)
