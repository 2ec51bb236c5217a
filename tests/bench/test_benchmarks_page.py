"""docs/benchmarks.md runs: its code is taken from the page and executed."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from warploom.bench import peers
from warploom.bench.harness import Machine, Options, run_bench
from warploom.bench.timing import WallTimer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def code(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


@pytest.fixture
def bench(tmp_path) -> Path:
    """The bench of the page, run once; the directory that holds its record as `bench/results`."""
    module = ModuleType("page")
    exec(code("def parts"), vars(module))
    machine = Machine("cpu", WallTimer(min_sample=0.0), rounds=1)
    machine.ceilings["copy"] = 1e10
    options = Options(results=tmp_path / "bench" / "results", device="cpu")
    outcome = run_bench("train", module.parts(options), options, rooms=module.ROOMS, machine=machine)
    assert {row.who for row in outcome.record.parts["softmax"].rows} == {"ours", "torch"}
    return tmp_path


def test_benchmark_page_measures_reads_record(bench, monkeypatch, capsys):
    """The bench on the page measures and its record is read as shown."""
    monkeypatch.chdir(bench)
    exec(code("Record.from_json"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "softmax 4096 rows ours" in printed[0]


def test_benchmark_page_peer_not_installed(tmp_path, monkeypatch):
    """The peer on the page is reported as not installed."""
    folder = tmp_path / "pagepeers"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "fast.py").write_text(code("NEEDS"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers.build("softmax", None, package="pagepeers") == {"fast": peers.Missing("fastsoftmax not installed")}


def test_every_flag_and_field_the_page_names_exists():
    from warploom.bench import schema

    text = PAGE.read_text(encoding="utf-8")
    flags = set(re.findall(r"--([a-z]+)", text))
    assert flags and flags <= set(Options.__dataclass_fields__)
    known = {name for kind in vars(schema).values() for name in getattr(kind, "__dataclass_fields__", ())}
    named = set(re.findall(r"`(?:rows\[\]|parts\.<name>)\.([a-z]+)", text))
    assert named and named <= known
