"""What a person, a program and a picture get from a record."""

import importlib
import json
import sys

import pytest

from warploom.bench import environment, plots, table
from warploom.bench.schema import PartRecord, Record, Row, Spread
from warploom.engine.cli import main
from warploom.engine.cli.bench import BENCHES


@pytest.fixture
def record():
    rows = [
        Row("b1", "ours", Spread.of([0.002]), 2e6, "tok", limits={"copy": 0.5}, extra={"peak_bytes": 3 * 10**9}),
        Row("b1", "slowpeer", Spread.of([0.006]), 667e3, "tok", Spread.of([3.0]), extra={"first_seconds": 41.0}),
        Row("b1", "absent", missing="absent not installed"),
    ]
    part = PartRecord({}, "c0de", 1.0, 0.25, environment.capture("cpu"), {"copy": 2.5e10, "matmul float32": 2e11}, rows)
    return Record("fake", "here", parts={"decode": part})


def test_table_has_rows_units_no_empty_columns(record):
    """A table shows every row with units and drops empty columns."""
    columns, lines = table.cells(record.parts["decode"])
    assert columns == ["case", "who", "median", "p25–p75", "rate", "ours ÷ it", "% of copy", "first", "peak"]
    assert lines[0] == ["b1", "ours", "2 ms", "2 ms–2 ms", "2,000,000 tok/s", "", "50.0", "", "3 GB"]
    assert lines[1][5] == "3.00×" and lines[1][7] == "41 s"
    assert lines[2][2] == "– absent not installed"
    assert "others used 25 % of the machine" in table.subtitle(record.parts["decode"])
    assert "copy 25 GB/s · matmul float32 200 GFLOP/s" in table.subtitle(record.parts["decode"])


def test_brief_has_line_each_with_best_peer(record):
    """In brief our rows have a line each with the toughest peer."""
    record.parts["decode"].rows.append(Row("b1", "fastpeer", Spread.of([0.001]), 4e6, "tok", Spread.of([0.5])))
    assert table.brief(record) == ["  decode, b1: 2 ms · 2,000,000 tok/s · 50 % of copy · 0.50× fastpeer"]


def test_a_noisy_part_is_called_noisy(record):
    part = record.parts["decode"]
    assert "NOISY" not in table.subtitle(part)
    part.rows.append(Row("b1", "jumpy", Spread.of([1.0, 1.0, 2.0, 2.0])))
    assert "NOISY: quartiles up to 2.0× apart" in table.subtitle(part)


def test_the_plain_and_the_rich_table_say_the_same(record, capsys, monkeypatch):
    table.show(record)
    rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    table.show(record)
    plain = capsys.readouterr().out
    for cell in ("slowpeer", "3.00×", "absent not installed", "50.0"):
        assert cell in rich and cell in plain
    assert "┃" in rich and "┃" not in plain


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3247.4, "tok/s", "3,247 tok/s"),
        (1.5e12, "FLOP/s", "1.5 TFLOP/s"),
        (28.6e9, "B/s", "28.6 GB/s"),
        (12, "B", "12 B"),
        (0.5, "x", "0.5 x"),
    ],
)
def test_numbers_carry_the_prefix_one_would_say(value, unit, text):
    assert table.si(value, unit) == text


def test_pictures_are_drawn_without_a_screen(record, tmp_path):
    pytest.importorskip("matplotlib")
    plots.draw(record, tmp_path / "here" / "bars.png")
    plots.roofline([("ours: norm", 0.25, 1e9)], bandwidth=1e10, peak=1e12, path=tmp_path / "roof.png")
    for path in (tmp_path / "here" / "bars.png", tmp_path / "roof.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no timed row"):
        plots.draw(Record("fake", "here"), tmp_path / "none.png")


@pytest.fixture
def fake_bench(tmp_path, monkeypatch):
    """A bench `speed` of two parts and a flag of its own, in place of the real ones."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "speed.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Annotated\n"
        "from warploom.bench import harness\n"
        "DEVICE = 'cpu'\n"
        "@dataclass(frozen=True)\n"
        "class Options(harness.Options):\n"
        "    size: Annotated[int, 'how large'] = 2\n"
        "def parts(options):\n"
        "    run = lambda machine, size: machine.compare('x', {'ours': lambda: sum(range(size))})\n"
        "    return [harness.Part('sum', run, {'size': options.size}), harness.Part('fails', lambda machine: 1 / 0)]\n"
    )
    monkeypatch.setattr("warploom.engine.cli.bench.BENCHES", ("speed", "later"))
    monkeypatch.setattr("warploom.bench.__path__", [str(tmp_path / "modules")])
    yield tmp_path / "results"
    sys.modules.pop("warploom.bench.speed", None)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_is_ready_to_name_its_parts(name):
    assert callable(importlib.import_module(f"warploom.bench.{name}").parts)


def test_the_last_line_is_the_record_on_disk(fake_bench, capsys):
    code = main(["bench", "speed", "--results", str(fake_bench), "--size", "5", "--only", "sum"])
    last = capsys.readouterr().out.splitlines()[-1]
    (path,) = fake_bench.rglob("speed.json")
    assert code == 0
    assert json.loads(last) == json.loads(path.read_text())
    assert json.loads(last)["parts"]["sum"]["config"] == {"size": 5}


def test_gpu_session_failed_part_exits_1(fake_bench, capsys):
    """A failed part is told apart and ends with exit code 1."""
    assert main(["bench", "all", "--results", str(fake_bench)]) == 1
    captured = capsys.readouterr()
    assert "fails failed: ZeroDivisionError" in captured.err
    assert list(json.loads(captured.out.splitlines()[-1])["parts"]) == ["sum"]


def test_bench_unknown_name_one_sentence(fake_bench, capsys):
    """A bench that is not there and a part that is not there are one sentence."""
    assert main(["bench", "later"]) == 2
    assert capsys.readouterr().err == (
        "warploom bench: there is no 'later' bench yet (no later.py in warploom/bench); there are: speed\n"
    )
    assert main(["bench", "speed", "--results", str(fake_bench), "--only", "nothing"]) == 2
    assert "there are: sum, fails" in capsys.readouterr().err


def test_markdown_is_one_table_row_a_contestant(record):
    text = table.markdown(record.parts["decode"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert rows[1].startswith("| --- | --- |")
    assert rows[3].startswith("| b1 | slowpeer | 6 ms |")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "tpu"], "device is 'tpu'; it must be cpu or cuda"),
        (["--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--threads", "-1"], "threads is -1; it must be at least 0"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(fake_bench, capsys, flags, sentence):
    assert main(["bench", "speed", "--results", str(fake_bench), *flags]) == 2
    assert capsys.readouterr().err == f"warploom bench: {sentence}\n"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "_sees_gpu", lambda: False)
    assert environment.find_device() == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA GPU here"):
        environment.find_device("cuda")
