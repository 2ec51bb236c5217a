"""Benchmark harness: parts, comparisons, records, resumption.

A bench is a module `bench/<name>.py`. Its `parts(options)` lists what it measures, most important first:

    def parts(options):
        return [Part("float32", compare_step, config={"dtype": "float32"}, minutes=1)]

    def compare_step(machine, dtype):
        contestants = {"ours": our_step(...)} | peers.build("train", ...)
        return machine.compare("llama-tiny", contestants, amount=4096, unit="tok", limits={f"matmul {dtype}": flops})

`run_bench` runs the parts that are not on record yet, or whose record no longer holds, and saves after each. A run
that is stopped, by the budget, by Ctrl-C or by losing the machine, has lost at most the part under way.

A part may take the whole process down: an illegal address ends its CUDA context, and a deadlock hangs it. So a part's
name is in a file beside the record while it runs. A process that finds a name there at its start skips that part.
"""

import faulthandler
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated

from ..engine.errors import InputError
from ..engine.memory import PeakMemory, release
from ..tokenizer.sources import write_text
from . import ceilings, environment, peers
from .schema import PartRecord, Record, Row, Spread, Value, load_record
from .timing import Timer, WallTimer, interleave, synchronize, timer_for

IN_CHECKOUT = (environment.ROOT / "pyproject.toml").is_file()
RESULTS = environment.ROOT / "bench" / "results" if IN_CHECKOUT else Path("bench-results")


LATE = peers.Missing("no time was left to begin it")


@dataclass(frozen=True)
class Options:
    """Options of every bench: a flag a field, with its line of `--help`.

    A bench with flags of its own subclasses this, and calls the class `Options` too."""

    results: Annotated[Path, "directory of the records: <device>/<bench>.json"] = RESULTS
    minutes: Annotated[float, "begin no part that would end later than this"] = 60.0
    only: Annotated[str, "run only the parts whose name is, contains or matches this (fp8*)"] = ""
    again: Annotated[bool, "measure also what is on record and still holds"] = False
    plot: Annotated[bool, "draw <device>/<bench>.png beside the record"] = False
    device: Annotated[str, "cpu or cuda; by default cuda where there is one"] = ""
    threads: Annotated[int, "threads for torch's operators; 0 leaves its choice"] = 0
    rounds: Annotated[int, "rounds of a comparison, at most"] = 15
    seconds: Annotated[float, "time for the rounds of one comparison (a few are run anyway)"] = 30.0
    limit: Annotated[float, "minutes a part may take (no peer is begun in the second half), or the process ends"] = 0.0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("threads", 0), ("seconds", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Part:
    """Unit of a benchmark that is measured, saved and resumed as a whole."""

    name: str
    run: Callable[..., list[Row]]
    """Called as `run(machine, **config)`."""
    config: dict[str, Value] = field(default_factory=dict)
    """Settings that the result depends on besides the code; changing it makes a record stale."""
    minutes: float = 0.0
    """About how long it takes: it is not begun with less of the budget left."""


class Machine:
    """Measuring instruments of a part: device, timer, ceilings, fair comparison."""

    def __init__(self, device: str = "cpu", timer: Timer | None = None, *, rounds: int = 15, seconds: float = 30.0):
        self.device, self.timer = device, timer or timer_for(device)
        self.rounds, self.seconds = rounds, seconds
        self.ceilings: dict[str, float] = {}
        self.measure = partial(ceilings.measure, device=self.device, timer=self.timer)
        self.peers_until = math.inf

    @classmethod
    def from_options(cls, options: Options) -> "Machine":
        """Make the machine from the command line's options."""
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        return cls(environment.find_device(options.device), rounds=options.rounds, seconds=options.seconds)

    def ceiling(self, name: str) -> float:
        """The measured ceiling `name` (see `ceilings.RATES`), once a run."""
        if name not in self.ceilings:
            self.ceilings[name] = self.measure(name)
        return self.ceilings[name]

    def with_wall_clock(self) -> "Machine":
        """The same machine with a wall clock, for whole systems with their own threads and streams."""
        twin = Machine(self.device, WallTimer(), rounds=self.rounds, seconds=self.seconds)
        twin.ceilings, twin.measure, twin.peers_until = self.ceilings, self.measure, self.peers_until
        return twin

    def has_time_for(self, who: str, ours: str) -> bool:
        """Return whether a contestant may still start: ours always, so that slow peers cost no record of ours."""
        return who == ours or self.peers_until == math.inf or self.timer.clock() < self.peers_until

    def prepare(
        self, builders: peers.Builders, ours: str = "ours"
    ) -> tuple[peers.Contestants, dict[str, dict[str, Value]]]:
        """Build each contestant and call it once; return the calls, and what building took (`extra` of `compare`).

        `first_seconds` is the time from nothing to the end of the first call; `peak_bytes` the memory it added."""
        calls: peers.Contestants = {}
        extra: dict[str, dict[str, Value]] = {}
        for who, build in builders.items():
            if isinstance(build, peers.Missing):
                calls[who] = build
                continue
            if not self.has_time_for(who, ours):
                calls[who] = LATE
                continue
            begin = self.timer.clock()
            try:
                with PeakMemory(self.device) as peak:
                    calls[who] = build()
                    calls[who]()
                    synchronize(self.device)
            except Exception as error:
                if who == ours:
                    raise
                calls[who] = peers.Missing(peers.failure(error))
                continue
            extra[who] = {"first_seconds": self.timer.clock() - begin, "peak_bytes": peak.bytes}
        return calls, extra

    def compare(
        self,
        case: str,
        contestants: peers.Contestants,
        *,
        amount: float = 1.0,
        unit: str = "call",
        limits: Mapping[str, float] | None = None,
        extra: Mapping[str, dict[str, Value]] | None = None,
        warmup: int = 2,
        least: int = 3,
        ours: str = "ours",
    ) -> list[Row]:
        """Time contestants interleaved, in alternating order; return a row for each.

        amount, unit: the work of one call (`rate` is amount a second). limits: for each ceiling, the bytes or FLOPs
        one call must at least move or do. extra: more columns, by contestant; read after the measurement, so calls
        may fill it. warmup, least: calls before the first round, and rounds even where the time is up; fewer for
        calls of many seconds. A contestant that fails in warm-up becomes a row saying so; `ours` failing is an error.
        """
        ready, times, missing = self._warm_up(contestants, warmup, ours)
        budget = {"rounds": self.rounds, "seconds": self.seconds, "least": least}
        samples = interleave(ready, self.timer, **budget, estimates={who: times[who][-1] for who in ready})
        first = {who: {"first_seconds": times[who][0]} if who in ready else {} for who in contestants}
        columns = {who: first[who] | dict((extra or {}).get(who, {})) for who in contestants}
        outcome = {who: samples.get(who) or peers.Missing(missing[who]) for who in contestants}
        return self.rows(case, outcome, amount=amount, unit=unit, limits=limits, extra=columns, ours=ours)

    def rows(
        self,
        case: str,
        samples: Mapping[str, list[float] | peers.Missing],
        *,
        amount: float = 1.0,
        unit: str = "call",
        limits: Mapping[str, float] | None = None,
        extra: Mapping[str, dict[str, Value]] | None = None,
        ours: str = "ours",
    ) -> list[Row]:
        """Rows from externally measured seconds (a fresh process, a server): one sample a round and contestant."""
        rates = {name: self.ceiling(name) for name in limits or {}}
        base = samples.get(ours)
        rows = []
        for who, times in samples.items():
            more = dict((extra or {}).get(who, {}))
            if isinstance(times, peers.Missing):
                rows.append(Row(case, who, unit=unit, extra=more, missing=times.reason))
                continue
            seconds = Spread.of(times)
            paired = [theirs / our for theirs, our in zip(times, base)] if isinstance(base, list) else []
            rows.append(
                Row(
                    case=case,
                    who=who,
                    seconds=seconds,
                    rate=amount / seconds.median,
                    unit=unit,
                    ratio=Spread.of(paired) if paired and who != ours else None,
                    limits={name: least / seconds.median / rates[name] for name, least in (limits or {}).items()},
                    extra=more,
                )
            )
        return rows

    def _warm_up(self, contestants: peers.Contestants, calls: int, ours: str) -> tuple[dict, dict, dict]:
        """Warm up; return the working calls, their first times, and the reasons of failures."""
        ready: dict[str, Callable[[], object]] = {}
        times: dict[str, list[float]] = {}
        missing: dict[str, str] = {}
        for who, call in contestants.items():
            if isinstance(call, peers.Missing):
                missing[who] = call.reason
                continue
            if not self.has_time_for(who, ours):
                missing[who] = LATE.reason
                continue
            try:
                times[who] = [self.timer.sample(call, 1) for _ in range(max(1, calls))]
                ready[who] = call
            except Exception as error:
                if who == ours:
                    raise
                missing[who] = peers.failure(error)
        return ready, times, missing


class DeviceLost(SystemExit):
    """The GPU no longer answers this process; a new process can continue."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a benchmark run."""

    record: Record
    path: Path
    stale: dict[str, str]
    """Parts that are still to be measured, and why."""
    failed: dict[str, str]
    """Parts that raised, and the sentence they raised."""


def run_bench(
    bench: str,
    parts: list[Part],
    options: Options,
    *,
    rooms: tuple[str, ...] | None = None,
    machine: Machine | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Outcome:
    """Measure the parts that the record of `bench` lacks, most important first, saving after each."""
    begin = clock()
    machine = machine or Machine.from_options(options)
    now = environment.capture(machine.device)
    code = environment.fingerprint(bench, rooms or environment.ROOMS)
    path = Path(options.results) / now.device / f"{bench}.json"
    record = load_record(path, bench, now.device)
    parts = [_with_threads(part, options.threads) for part in chosen(parts, options.only)]
    due = {part.name: stale(record, part, now, code) or ("again" if options.again else None) for part in parts}
    failed: dict[str, str] = {}
    crashed = CrashedParts(path.with_suffix(".deadly"), code)
    for part in parts:
        if not due[part.name]:
            continue
        if part.name in crashed.names and not options.again:
            failed[part.name] = "it took its process down; --again tries it once more"
            continue
        left = options.minutes - (clock() - begin) / 60
        if left <= 0 or part.minutes > left:
            say(f"{bench}: {part.name}: left for the next run ({max(left, 0):.1f} minutes left)")
            continue
        say(f"{bench}: {part.name} ({due[part.name]}" + (f", about {part.minutes:g} min)" if part.minutes else ")"))
        try:
            with crashed.trying(part.name, options.limit):
                measured = _measure(part, machine, code, clock, options.limit)
                Record(bench, now.device, parts={part.name: measured}).to_json()  # refuses what is no number
        except KeyboardInterrupt:
            say(f"{bench}: interrupted in {part.name}; finished parts are in {path}")
            raise
        except Exception as error:
            traceback.print_exc()
            failed[part.name] = peers.failure(error)
            _check_device(machine.device, crashed, part.name)
            continue
        record.parts[part.name] = measured
        record.save(path)
        due[part.name] = None
    return Outcome(record, path, {name: reason for name, reason in due.items() if reason}, failed)


class CrashedParts:
    """File of the parts that killed their process, or are running now and might."""

    def __init__(self, path: Path, code: str):
        self.path, self.code = path, code
        lines = path.read_text().splitlines() if path.exists() else []
        self.names = {name for line in lines for key, _, name in [line.partition(" ")] if key == code}
        if not self.names:  # entries are of other code
            path.unlink(missing_ok=True)

    @contextmanager
    def trying(self, name: str, minutes: float) -> Iterator[None]:
        """Mark the part as running, and end the process if it takes longer than `minutes`."""
        self.add(name)
        if minutes:
            faulthandler.dump_traceback_later(60 * minutes, exit=True)
        try:
            with _terminable():
                yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._write(self.names - {name})

    def add(self, name: str) -> None:
        """Mark a part as one that ends its process."""
        self._write(self.names | {name})

    def _write(self, names: set[str]) -> None:
        self.names = names
        write_text(self.path, "".join(f"{self.code} {name}\n" for name in sorted(names)))
        if not names:
            self.path.unlink()


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit: a process that is asked to end (`timeout`, a shutdown) does so in order, and the
    part is not blamed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_device(device: str, crashed: CrashedParts, name: str) -> None:
    """After a failure, check that this process can still use its GPU; raise DeviceLost if not."""
    try:
        synchronize(device)
    except Exception as error:
        crashed.add(name)
        raise DeviceLost(f"{name} lost the device: {peers.failure(error)}") from error


def stale(record: Record, part: Part, now: environment.Environment, code: str) -> str | None:
    """Reason to measure `part` (again), or None if its record is still valid."""
    old = record.parts.get(part.name)
    if old is None:
        return "not measured yet"
    if old.config != part.config:
        return "its configuration changed"
    if old.code != code:
        return "the code changed"
    if old.environment.versions != now.versions:
        return "the versions changed"
    return None


def _measure(part: Part, machine: Machine, code: str, clock: Callable[[], float], limit: float) -> PartRecord:
    release(machine.device)  # what the part before has left
    started, before, others = clock(), environment.capture(machine.device), environment.OtherWork()
    machine.peers_until = machine.timer.clock() + 30 * limit if limit else math.inf
    rows = part.run(machine, **{name: value for name, value in part.config.items() if name != "threads"})
    return PartRecord(
        config=dict(part.config),
        code=code,
        took=clock() - started,
        others=others.share(),
        environment=replace(before, threads=environment.threads()),  # known once torch has been loaded
        ceilings=dict(machine.ceilings),
        rows=list(rows),
    )


def _with_threads(part: Part, threads: int) -> Part:
    """Part with a non-default number of threads, which is another measurement."""
    return replace(part, config={**part.config, "threads": threads}) if threads else part


def chosen(parts: list[Part], only: str) -> list[Part]:
    """The part of that name, or those whose name contains or matches it."""
    exact = [part for part in parts if part.name == only]
    found = exact or [part for part in parts if only in part.name or fnmatch(part.name, only)]
    if parts and not found:
        raise InputError(
            f"--only is {only!r}, which names no part; there are: {', '.join(part.name for part in parts)}"
        )
    return found
