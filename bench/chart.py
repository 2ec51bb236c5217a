"""Chart of the README from saved records: `warploom bench chart` writes docs/chart.svg.

An SVG written as text: the same records give the same bytes, so a test can tell whether the chart is what they say.
Its colors show on a light page and on a dark one.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from ..engine.errors import InputError
from .harness import RESULTS
from .plots import OURS, PEER
from .schema import PartRecord, load_record
from .table import si

DEVICE = "intel-xeon-processor-2-cores"
TEXT = "#7d8590"
WIDTH, LABEL, BAR, LINE = 860, 250, 430, 17


@dataclass(frozen=True)
class Panel:
    """One workload of a record, with its title in the chart."""

    bench: str
    part: str
    title: str


PANELS = (
    Panel("train", "llama-24m float32 compiled", "Training, 24M Llama, float32"),
    Panel("train", "llama-tiny float32 compiled", "Training, Llama of width 256, float32"),
    Panel("serve", "batch 1", "Serving, bfloat16, one request"),
    Panel("serve", "batch 8 int8", "Serving, 8 bits, batch of 8"),
    Panel("serve", "mixed", "Serving, bfloat16, 32 requests of mixed lengths"),
    Panel("tokenizer", "arrays english", "Tokenizing English, one thread"),
)


def draw(results: Path = RESULTS, device: str = DEVICE) -> str:
    """Draw the chart as SVG: a panel a workload, a bar a contestant, scaled to the fastest."""
    body, top = [], 24
    for panel in PANELS:
        record = results / device / f"{panel.bench}.json"
        part = load_record(record, panel.bench, device).parts.get(panel.part)
        if part is None:
            raise InputError(
                f"{record} has no {panel.part!r}: warploom bench {panel.bench} makes it, or give other --results"
            )
        lines, top = _panel(panel.title, part, top)
        body += lines
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" '
    return "\n".join([head + f'font-size="13" fill="{TEXT}">', *body, "</svg>", ""])


def _panel(title: str, part: PartRecord, top: int) -> tuple[list[str], int]:
    """Lines of a panel, and the y coordinate behind it."""
    extra = ("ours kv16", "ours http")  # variants of ours have a table of their own
    speeds = {row.who: (row.rate, row.unit) for row in part.rows if row.rate and row.who not in extra}
    fastest = max(rate for rate, _ in speeds.values())
    about = f"{part.environment.cpu}, {part.environment.threads} threads, {part.environment.date[:10]}"
    lines = [f'<text x="8" y="{top}" font-weight="bold">{escape(title)}</text>']
    lines.append(f'<text x="{WIDTH - 8}" y="{top}" text-anchor="end" font-size="11">{escape(about)}</text>')
    for who, (rate, unit) in sorted(speeds.items(), key=lambda item: -item[1][0]):
        top += LINE
        color, name = (OURS, "warploom") if who == "ours" else (PEER, who)
        length = max(BAR * rate / fastest, 1)
        lines.append(f'<text x="{LABEL - 8}" y="{top + 4}" text-anchor="end">{escape(name)}</text>')
        lines.append(f'<rect x="{LABEL}" y="{top - 7}" width="{length:.1f}" height="13" rx="2" fill="{color}"/>')
        lines.append(f'<text x="{LABEL + length + 6:.1f}" y="{top + 4}" font-size="11">{si(rate, unit)}/s</text>')
    return lines, top + 32
