"""Generator of the tables in docs/quantization.md, from the record of `warploom bench quantization`.

python -m warploom.bench.quantization_page   # writes them anew; a test says when that is due
"""

from collections.abc import Iterable

from . import environment
from .harness import RESULTS
from .schema import Record, load_record

PAGE = environment.ROOT / "docs" / "quantization.md"
DEVICE = "amd-epyc-2-cores"
LOSS = "| scheme | bits a weight | rms of log-probabilities | KL | how |"
RATED = "ours int8", "ours int4", "ours as it is", "llama.cpp Q4_1", "llama.cpp Q8_0", "OpenVINO Q4_1", "OpenVINO Q8_0"
SPEED = f"| tok/s | int8 | int4 | the Q4_1 file as it is | {' | '.join(RATED[3:])} |"
SCHEMES = {  # by its name in the record: the page's name, bits a weight of SmolLM2-135M, and how one asks for it
    "bfloat16": ("bfloat16", "16", '`dtype="bfloat16"`'),
    "int8": ("int8", "8.25", '`quantize="int8"`'),
    "int8 a16": ("int8, activations of 16 bits", "8.25", "`quantize=Scheme(activations=16)`"),
    "int8 calibrated": ("**int8, calibrated**", "8.25", "`warploom quantize --calibrate TEXT`"),
    "int8 calibrated on samples": ("int8, calibrated on its own samples", "8.25", "`warploom quantize --calibrate`"),
    "int4": ("int4, head and down products in 8", "5.9", '`quantize="int4"`'),
    "int4 calibrated": ("**int4, calibrated**, head in 4", "5.2", "`warploom quantize --bits 4 --calibrate TEXT`"),
    "int4 calibrated on samples": (
        "int4, calibrated on its own samples", "5.2", "`warploom quantize --bits 4 --calibrate`",
    ),
    "as it is": ("the model's own file, Q4_1", "5.0", '`LLM("model.gguf")`: weights in every bit'),
}  # fmt: skip
WORK = {
    "decode 1": "decode, alone", "decode 8": "decode, batch 8", "decode 32": "decode, batch 32",
    "prefill 1": "prefill, 1 × 256", "prefill 8": "prefill, 8 × 256", "prefill 32": "prefill, 32 × 64",
}  # fmt: skip
OURS = {"Q4_1": "ours as it is", "Q8_0": "ours int8"}  # beside a peer's format


def loss_rows(record: Record) -> Iterable[str]:
    """Rows of recorded schemes."""
    yield LOSS
    yield "|---|---|---|---|---|"
    told = [row for part in record.parts.values() for row in part.rows if "kl" in row.extra]
    rows = {row.who.removeprefix("ours "): row.extra for row in told}
    for name, (title, bits, how) in SCHEMES.items():
        if name in rows:
            lost = rows[name]
            yield f"| {title} | {bits} | {_short(float(lost['rms'] or 0))} | {_short(float(lost['kl'] or 0))} | {how} |"


def speed_rows(record: Record) -> Iterable[str]:
    """Rows of recorded workloads; a dash where a peer was not measured."""
    yield SPEED
    yield "|---" * (1 + len(RATED)) + "|"
    for name, title in WORK.items():
        if name in record.parts:
            rates = {row.who: row.rate for row in record.parts[name].rows if row.rate}
            yield f"| {title} | {' | '.join(_rate(who, rates) for who in RATED)} |"


def _rate(who: str, rates: dict[str, float]) -> str:
    """Tokens a second; for a peer also our speedup over it."""
    if who not in rates:
        return "–"
    ours = rates.get(OURS.get(who.rpartition(" ")[2], ""))
    return f"{rates[who]:,.0f}" + (f" ({ours / rates[who]:.1f})" if ours else "")


def page(text: str, record: Record) -> str:
    """The page with its tables updated from the record."""
    for rows in (list(loss_rows(record)), list(speed_rows(record))):
        lines = text.split("\n")
        first = next(at for at, line in enumerate(lines) if line.startswith(rows[0][:40]))
        last = next(at for at in range(first, len(lines)) if not lines[at].startswith("|"))
        text = "\n".join([*lines[:first], *rows, *lines[last:]])
    return text


def measured() -> Record:
    """The record that the page shows."""
    return load_record(RESULTS / DEVICE / "quantization.json", "quantization", DEVICE)


def _short(value: float) -> str:
    """Format with two significant digits: 0.0025, 0.041, 0.31."""
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), measured()))
