"""Plots of a record, without a display: bars of speed, rooflines."""

from collections.abc import Sequence
from pathlib import Path

from ..tokenizer.sources import atomic_writer
from .schema import Record, Row
from .table import si

OURS, PEER = "#d1495b", "#8d99ae"


def draw(record: Record, path: Path) -> None:
    """Draw bars for every timed case: one panel a case, quartiles of each contestant."""
    panels = [
        (f"{name}: {case}", [row for row in part.rows if row.case == case and row.seconds and row.rate])
        for name, part in record.parts.items()
        for case in dict.fromkeys(row.case for row in part.rows)
    ]
    panels = [(title, rows) for title, rows in panels if rows]
    if not panels:
        raise ValueError(f"the record of bench {record.bench!r} holds no timed row to draw")
    heights = [0.9 + 0.34 * len(rows) for _, rows in panels]
    figure, all_axes = _figure(9, sum(heights), rows=len(panels), heights=heights)
    for axes, (title, rows) in zip(all_axes, panels):
        _bars(axes, title, rows)
    _save(figure, path)


def roofline(
    points: Sequence[tuple[str, float, float]], *, bandwidth: float, peak: float, path: Path, title: str = ""
) -> None:
    """Draw operations as points under the machine's roofline.

    points: (label, FLOPs a byte, FLOPs a second reached). bandwidth (B/s), peak (FLOP/s): measured.
    """
    figure, (axes,) = _figure(9, 5.5)
    ridge = peak / bandwidth
    intensities = [point[1] for point in points] or [ridge]
    left, right = min(*intensities, ridge) / 4, max(*intensities, ridge) * 4
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color="black", linewidth=1.5)
    for label, intensity, rate in points:
        reached = rate / min(peak, intensity * bandwidth)
        axes.scatter([intensity], [rate], color=OURS if label.startswith("ours") else PEER, zorder=3)
        axes.annotate(
            f"{label} {100 * reached:.0f} %", (intensity, rate), fontsize=7, xytext=(5, -3), textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOPs a second", title=title)
    axes.grid(True, which="both", alpha=0.2)
    _save(figure, path)


def _bars(axes, title: str, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.rate)
    names = [row.who for row in rows]
    rates = [row.rate for row in rows]
    quartiles = [
        (row.rate * row.seconds.median / row.seconds.high, row.rate * row.seconds.median / row.seconds.low)
        for row in rows
    ]
    errors = [
        [rate - low for rate, (low, _) in zip(rates, quartiles)],
        [high - rate for rate, (_, high) in zip(rates, quartiles)],
    ]
    colors = [OURS if name.startswith("ours") else PEER for name in names]
    axes.barh(names, rates, color=colors, xerr=errors, error_kw={"linewidth": 1, "capsize": 2})
    for index, row in enumerate(rows):
        text = si(row.rate, f"{row.unit}/s") + (f"  (ours {row.ratio.median:.2f}×)" if row.ratio else "")
        axes.annotate(text, (0, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _figure(width: float, height: float, rows: int = 1, heights: Sequence[float] = (1,)):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False, gridspec_kw={"height_ratios": list(heights)})
    return figure, axes[:, 0]


def _save(figure, path: Path) -> None:
    with atomic_writer(path) as file:
        figure.savefig(file, dpi=150, format="png")
