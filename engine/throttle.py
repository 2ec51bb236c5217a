"""Reports of long work, at most one every ten seconds."""

import time
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
EVERY = 10.0  # seconds


def throttled(report: Callable[P, object]) -> Callable[P, None]:
    """The function, called at most every ten seconds, for the first time ten seconds from now."""
    latest = time.monotonic()

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal latest
        if time.monotonic() - latest > EVERY:
            latest = time.monotonic()
            report(*args, **kwargs)

    return call
