"""Tables of docs/quantization.md: those of the record."""

from warploom.bench import environment, quantization_page
from warploom.bench.schema import PartRecord, Record, Row


def test_quantization_page_is_the_records():
    text = quantization_page.PAGE.read_text()
    assert quantization_page.page(text, quantization_page.measured()) == text, (
        "python -m warploom.bench.quantization_page"
    )


def test_tables_have_a_row_for_what_was_measured():
    """The page has rows for recorded schemes and workloads alone."""
    parts = {
        "fidelity": [Row("m", "ours int8", extra={"rms": 0.0871, "kl": 0.00251})],
        "decode 8": [Row("m", who, rate=2000.0) for who in quantization_page.RATED[:-1]],
    }
    here = environment.capture("cpu")
    record = Record("quantization", "cpu")
    for name, rows in parts.items():
        record.parts[name] = PartRecord({}, "", 1.0, 0.0, here, {}, rows)
    assert list(quantization_page.loss_rows(record))[2:] == ['| int8 | 8.25 | 0.087 | 0.0025 | `quantize="int8"` |']
    (told,) = list(quantization_page.speed_rows(record))[2:]
    assert told == "| decode, batch 8" + " | 2,000" * 3 + " | 2,000 (1.0)" * 3 + " | – |"
