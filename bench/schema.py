"""Benchmark records: one JSON file a benchmark and device, resumable part by part.

A `Record` holds finished `PartRecord`s. A part is the unit of resumption: it is saved the moment it ends, together
with everything its numbers depend on (configuration, code fingerprint, environment, ceilings measured beside it), so
that a later run can tell whether it still holds or must be measured again. A part's `Row`s are what the table shows:
one contestant on one case.

Amounts are in base units (seconds, bytes, FLOPs, tokens); only the table uses prefixes. Whoever changes a field raises
`SCHEMA`: a record of another schema is begun anew.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from ..engine.errors import InputError
from ..tokenizer.sources import write_text

SCHEMA = 1
Value = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with quartiles."""

    median: float
    low: float
    """25th percentile."""
    high: float
    """75th percentile."""
    mad: float
    """Median absolute deviation from the median."""
    least: float
    """The smallest sample: what a quiet machine would say."""
    count: int
    """Samples behind the figures."""

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        """Compute from `samples` (at least one)."""
        middle = median(samples)
        low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [middle] * 3
        mad = median(abs(sample - middle) for sample in samples)
        return cls(middle, low, high, mad, min(samples), len(samples))


@dataclass(frozen=True, slots=True)
class Row:
    """Result of one contestant on one case."""

    case: str
    """The workload: a shape, a data set, a batch size."""
    who: str
    """`ours`, or the peer's name."""
    seconds: Spread | None = None
    """Time of one call."""
    rate: float | None = None
    """Units of work a second, at the median."""
    unit: str = ""
    """The unit of work: `tok`, `B`, `FLOP`, `call`."""
    ratio: Spread | None = None
    """Our speed over this peer's, round by round (above 1: we are faster). None for ourselves."""
    limits: dict[str, float] = field(default_factory=dict)
    """The share reached of each physical limit, by the ceiling's name."""
    extra: dict[str, Value] = field(default_factory=dict)
    """Whatever else belongs beside the time: `first_seconds`, `peak_bytes`, `loss`, `registers`, …"""
    missing: str | None = None
    """Why there is no measurement: the package is absent, or the sentence it failed with."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Machine and software that a part was measured on."""

    date: str
    """UTC, ISO 8601, to the second."""
    device: str
    """Short name of what was measured; the folder of the record."""
    cpu: str
    cpu_flags: list[str]
    """The instruction sets that decide speed: AVX-512, bf16, AMX, VNNI, …"""
    cores: int
    threads: int
    """Threads that torch's operators use."""
    memory_bytes: int | None
    load: float | None
    """Load average of the last minute as the part began: 0 is a quiet machine."""
    gpu: str | None
    driver: str | None
    platform: str
    versions: dict[str, str]
    """python and the packages that decide speed."""
    commit: str | None
    dirty: bool | None
    """True if the working tree differed from the commit."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A finished part."""

    config: dict[str, Value]
    """Configuration asked for. A different question makes the part stale."""
    code: str
    """Fingerprint of the sources the numbers depend on."""
    took: float
    """Seconds the whole part took, builds and warm-up included."""
    others: float | None
    """Share of the machine's cores that other processes used meanwhile: 0 is a quiet machine."""
    environment: Environment
    ceilings: dict[str, float]
    """Rates measured in the same run: bytes a second for `copy` and `read`, FLOPs a second for `matmul …`."""
    rows: list[Row]


@dataclass(slots=True)
class Record:
    """All finished parts of one benchmark on one device."""

    bench: str
    device: str
    schema: int = SCHEMA
    parts: dict[str, PartRecord] = field(default_factory=dict)

    def to_json(self, indent: int | None = None) -> str:
        """Serialize to JSON; one line unless `indent` is given."""
        return json.dumps(dataclasses.asdict(self), indent=indent, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Parse what `to_json` wrote."""
        data = json.loads(text)
        parts = {name: _part(part) for name, part in data["parts"].items()}
        return cls(bench=data["bench"], device=data["device"], schema=data["schema"], parts=parts)

    def save(self, path: Path) -> None:
        """Write atomically: on failure the previous record stays."""
        write_text(path, self.to_json(indent=1) + "\n")


def load_record(path: Path, bench: str, device: str) -> Record:
    """Load the record at `path`; an empty one if there is none or its schema differs."""
    if not path.exists():
        return Record(bench, device)
    try:
        text = path.read_text(encoding="utf-8")
        if json.loads(text)["schema"] != SCHEMA:
            return Record(bench, device)
        return Record.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no bench record ({type(error).__name__}: {error}); move it away or give another --results"
        ) from None


def _part(data: dict) -> PartRecord:
    rows = [Row(**{**row, "seconds": _spread(row["seconds"]), "ratio": _spread(row["ratio"])}) for row in data["rows"]]
    return PartRecord(**{**data, "environment": Environment(**data["environment"]), "rows": rows})


def _spread(data: dict | None) -> Spread | None:
    return None if data is None else Spread(**data)
