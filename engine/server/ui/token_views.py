"""HTML and SVG views for the playground: tokens colored by probability, attention heat maps.

Made here, so that the page needs no library and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ..openai.responses import Words

CSS = """
.loom-title { display: flex; gap: .9rem; align-items: baseline; flex-wrap: wrap; padding: .2rem 0; }
.loom-title b { font-size: 1.6rem; } .loom-title span { opacity: .65; font-size: .9rem; }
#chat { height: clamp(14rem, calc(100dvh - 19rem), 60rem) !important; }
#chat-line { align-items: center; flex-wrap: nowrap; min-height: 2rem; } #continue-chat { min-width: 6rem; }
@media (max-width: 640px) {
  gradio-app > div { padding: 0 .4rem !important; }
  .loom-facts { font-size: 11px; } .loom-title b { font-size: 1.15rem; } .loom-title span { font-size: .75rem; }
  #chat { height: calc(100dvh - 21rem) !important; }
}
.loom-tokens { font: 15px/2.1 ui-monospace, monospace; white-space: break-spaces; overflow-wrap: anywhere;
  padding: .6rem .2rem; }
.loom-tokens > i { font-style: normal; opacity: .55; }
.loom-tokens > span { position: relative; border-radius: 4px; padding: .15em 0; cursor: default;
  background: hsl(var(--h) 75% 50% / .30); box-shadow: inset 0 -2px hsl(var(--h) 75% 45% / .75); }
.loom-tokens > span:hover { background: hsl(var(--h) 75% 50% / .6); }
.loom-tokens > span > b { display: none; position: absolute; z-index: 20; left: 0; top: 1.7em; width: max-content;
  font: 13px/1.5 ui-monospace, monospace; padding: .5rem .7rem; border-radius: 8px; white-space: pre;
  background: var(--background-fill-primary); color: var(--body-text-color);
  border: 1px solid var(--border-color-primary); box-shadow: 0 6px 24px rgb(0 0 0 / .25); }
.loom-tokens > span:hover > b { display: block; }
.loom-tokens > span > b > u { text-decoration: none; display: grid; grid-template-columns: 7.5em 4.2em 6em; gap: .6em; }
.loom-tokens > span > b > u > s { text-decoration: none; align-self: center; height: .55em; border-radius: 3px;
  background: linear-gradient(90deg, #7c5cff calc(var(--p) * 1%), transparent 0); }
.loom-tokens > span > b > u.taken { font-weight: 700; }
.loom-facts { font: 13px/1.6 ui-monospace, monospace; opacity: .8; min-height: 1.6em; }
.loom-heat { width: 100%; max-width: 760px; height: auto; display: block; margin: 0 auto; }
.loom-heat text { fill: var(--body-text-color); font: 11px ui-monospace, monospace; }
.loom-heat rect.cell:hover { stroke: var(--body-text-color); stroke-width: 1.5; }
.loom-legend { display: flex; gap: .7rem; align-items: center; font-size: 12px; opacity: .75; flex-wrap: wrap; }
.loom-legend i { width: 9rem; height: .6rem; border-radius: 4px;
  background: linear-gradient(90deg, hsl(0 75% 50% / .6), hsl(65 75% 50% / .6), hsl(130 75% 50% / .6)); }
"""
LEGEND = "<div class=loom-legend>unlikely<i></i>likely · hover over a token to see what else could have come</div>"


def token_view(prompt: str, entries: Sequence[Any], words: Words) -> str:
    """Prompt and generated tokens, colored by probability, with alternatives."""
    spans = "".join(_token(entry, words) for entry in entries)
    return f"<div class=loom-tokens><i>{escape(prompt)}</i>{spans}</div>{LEGEND}"


def facts(tokens: int, first: float | None, elapsed: float, reason: str | None) -> str:
    """One line on a generation's speed."""
    if first is None:
        return "<div class=loom-facts>waiting for the first token …</div>"
    rate = (tokens - 1) / (elapsed - first) if tokens > 1 and elapsed > first else 0
    ended = {"stop": " · ended by itself", "length": " · reached the limit", "cancelled": " · stopped"}.get(reason, "")
    speed = f" · <b>{rate:,.0f} tokens/s</b>" if rate else ""
    return f"<div class=loom-facts>{tokens} tokens{speed} · first after {first * 1000:.0f} ms{ended}</div>"


def heat_map(tokens: Sequence[str], weights: Sequence[Sequence[float]]) -> str:
    """Attention heat map: a row a query token, a column a key token."""
    size, margin = len(tokens), 92
    cell = max(10, min(34, 640 // max(size, 1)))
    width = margin + size * cell
    parts = [f"<svg class=loom-heat viewBox='0 0 {width + 6} {width + 6}' xmlns='http://www.w3.org/2000/svg'>"]
    for row, token in enumerate(tokens):
        label, middle = escape(_shown(token)[:12]), margin + row * cell + cell / 2
        parts.append(f"<text x='{margin - 6}' y='{middle + 4}' text-anchor='end'>{label}</text>")
        parts.append(f"<text transform='translate({middle + 4} {margin - 6}) rotate(-60)'>{label}</text>")
        for column in range(row + 1):
            weight = weights[row][column]
            says = escape(f"{_shown(token)} → {_shown(tokens[column])}: {weight:.1%}")
            parts.append(
                f"<rect class=cell x='{margin + column * cell}' y='{margin + row * cell}' width='{cell - 1}' "
                f"height='{cell - 1}' rx='2' fill='#7c5cff' fill-opacity='{0.06 + 0.94 * weight**0.6:.3f}'>"
                f"<title>{says}</title></rect>"
            )
    return "".join([*parts, "</svg>"])


def _token(entry: Any, words: Words) -> str:
    chance = math.exp(entry.logprob)
    rows = dict([*entry.top, (entry.token, entry.logprob)])
    lines = "".join(_alternative(words.text(token), logprob, token == entry.token) for token, logprob in rows.items())
    text = words.text(entry.token)
    shown = "·" if text.startswith("bytes:") or not text else escape(text).replace("\n", "⏎\n")
    return f"<span style='--h:{130 * math.sqrt(chance):.0f}'>{shown}<b>{lines}</b></span>"


def _alternative(text: str, logprob: float, taken: bool) -> str:
    percent = 100 * math.exp(logprob)
    return (
        f"<u class='{'taken' if taken else ''}'><em>{escape(_shown(text))}</em>{percent:5.1f}%"
        f"<s style='--p:{percent:.1f}'></s></u>"
    )


def _shown(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"
