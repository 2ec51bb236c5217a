"""Tables of a record: rich if installed, plain text, or Markdown for the docs."""

from .schema import PartRecord, Record, Row, Value

PREFIXED = {"B", "FLOP"}
NOISY = 1.25
FIRST = ("first_seconds", "peak_bytes")


def si(value: float, unit: str) -> str:
    """Format a number with its unit, prefixed where usual: `1.25 TFLOP/s`, `3,247 tok/s`."""
    if unit.split("/")[0] not in PREFIXED:
        return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Format seconds: `2.31 s`, `41.7 ms`, `9.05 µs`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def show(record: Record) -> None:
    """Print each part of a record: its environment, then a row a contestant."""
    for name, part in record.parts.items():
        title = f"{record.bench}: {name}"
        columns, lines = cells(part)
        try:
            _rich(title, subtitle(part), columns, lines)
        except ImportError:
            print(plain(title, subtitle(part), columns, lines))


def brief(record: Record) -> list[str]:
    """One line for each of our rows: time, rate, share of each limit, ratio to the fastest peer."""
    lines = []
    for name, part in record.parts.items():
        for row in part.rows:
            if row.seconds is None or not row.who.startswith("ours"):
                continue
            peers = [(p.ratio.median, p.who) for p in part.rows if p.case == row.case and p.ratio and row.who == "ours"]
            told = [duration(row.seconds.median), si(row.rate, f"{row.unit}/s") if row.rate else ""]
            told += [f"{100 * share:.0f} % of {limit}" for limit, share in row.limits.items()]
            told += [f"{ratio:.2f}× {who}" for ratio, who in sorted(peers)[:1]]
            who = "" if row.who == "ours" else f" ({row.who})"
            lines.append(f"  {name}, {row.case}{who}: {' · '.join(filter(None, told))}")
    return lines


def subtitle(part: PartRecord) -> str:
    """One line on a part's machine, commit and ceilings."""
    machine = part.environment
    commit = (machine.commit or "no commit")[:9] + ("+changes" if machine.dirty else "")
    rates = [f"{name} {si(rate, 'FLOP/s' if 'matmul' in name else 'B/s')}" for name, rate in part.ceilings.items()]
    where = machine.gpu or f"{machine.cpu}, {machine.threads} threads"
    busy = "" if part.others is None else f"others used {100 * part.others:.0f} % of the machine"
    return " · ".join(filter(None, [machine.date, where, busy, commit, *rates, _noise(part)]))


def _noise(part: PartRecord) -> str:
    apart = max((row.seconds.high / row.seconds.low for row in part.rows if row.seconds), default=1.0)
    return f"NOISY: quartiles up to {apart:.1f}× apart, measure again" if apart > NOISY else ""


def cells(part: PartRecord) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table; empty columns are left out."""
    limits = list(dict.fromkeys(name for row in part.rows for name in row.limits))
    extras = list(dict.fromkeys(name for row in part.rows for name in row.extra))
    extras.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    columns = ["case", "who", "median", "p25–p75", "rate", "ours ÷ it"]
    columns += [f"% of {name}" for name in limits] + [
        name.removesuffix("_seconds").removesuffix("_bytes") for name in extras
    ]
    lines = [_line(row, limits, extras) for row in part.rows]
    filled = [index for index in range(len(columns)) if any(line[index] for line in lines)]
    return [columns[index] for index in filled], [[line[index] for index in filled] for line in lines]


def markdown(part: PartRecord) -> str:
    """Format as Markdown, with machine and commit above."""
    columns, lines = cells(part)
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join([subtitle(part), "", *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plain(title: str, under: str, columns: list[str], lines: list[list[str]]) -> str:
    """Format as aligned plain text."""
    widths = [max(map(len, column)) for column in zip(columns, *lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [columns, *lines]]
    return "\n".join([title, under, *rows, ""])


def _line(row: Row, limits: list[str], extras: list[str]) -> list[str]:
    if row.missing:
        timing = [f"– {row.missing}", "", "", ""]
    elif row.seconds is None:
        timing = [""] * 4
    else:
        spread = f"{duration(row.seconds.low)}–{duration(row.seconds.high)}"
        rate = si(row.rate, f"{row.unit}/s") if row.rate is not None and row.unit != "call" else ""
        timing = [duration(row.seconds.median), spread, rate, f"{row.ratio.median:.2f}×" if row.ratio else ""]
    shares = [f"{100 * row.limits[name]:.1f}" if name in row.limits else "" for name in limits]
    return [row.case, row.who, *timing, *shares, *(_value(name, row.extra.get(name)) for name in extras)]


def _value(name: str, value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if name.endswith("_seconds"):
        return duration(value)
    if name.endswith("_bytes"):
        return si(value, "B")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rich(title: str, under: str, columns: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", caption=under, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line), style="bold" if line[1].startswith("ours") else "")
    console = Console()
    wide = console if console.is_terminal else Console(width=200)
    wide.print(table)
