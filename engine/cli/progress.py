"""Progress bars on a terminal, log lines every ten seconds otherwise; on stderr, so that results can be piped."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..throttle import throttled

Advance = Callable[..., None]


@contextmanager
def progress(*names: str, unit: str = "") -> Iterator[list[Advance]]:
    """For each name a function (done, total=None, amount=None); `amount` of a unit makes the rate, else `done` does."""
    began = time.perf_counter()

    def rate(amount: float) -> str:
        seconds = max(time.perf_counter() - began, 1e-9)
        return f", {amount / seconds:,.0f} {unit}/s" if unit else ""

    if not sys.stderr.isatty():

        @throttled
        def line(name: str, done: int, total: int | None = None, amount: float | None = None) -> None:
            of = "" if total is None else f" of {total:,}"
            print(f"{name}: {done:,}{of}{rate(done if amount is None else amount)}", file=sys.stderr, flush=True)

        yield [partial(line, name) for name in names]
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}{task.fields[rate]}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:

        def draw(task: TaskID, done: int, total: int | None = None, amount: float | None = None) -> None:
            shown = rate(done if amount is None else amount)
            bar.update(task, completed=done, total=total, visible=True, rate=shown)

        yield [partial(draw, bar.add_task(name, total=None, visible=False, rate="")) for name in names]
