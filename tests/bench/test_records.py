"""A record survives anything: saved whole after each part, resumed, and measured again when it no longer holds."""

import dataclasses
import json

import pytest

from warploom.bench import environment, harness
from warploom.bench.harness import Machine, Options, Part, run_bench, stale
from warploom.bench.schema import Record, Row, Spread, load_record
from warploom.bench.timing import WallTimer


@pytest.fixture
def bench(tmp_path):
    return FakeBench(tmp_path)


class FakeBench:
    """Parts that take a minute each on a fake clock, and a log of those that ran."""

    def __init__(self, results):
        self.results, self.now, self.ran, self.lines = results, 0.0, [], []

    def part(self, name: str, minutes: float = 1.0, error: Exception | None = None, **config) -> Part:
        def measure(machine, **config):
            self.ran.append(name)
            self.now += 60.0
            if error:
                raise error
            return [Row(name, "ours", Spread.of([1.0, 2.0, 4.0]), rate=0.5, unit="tok", extra=dict(config))]

        return Part(name, measure, config, minutes)

    def run(self, parts: list[Part], **options) -> harness.Outcome:
        self.ran.clear()
        asked = Options(results=self.results, device="cpu", **options)
        machine = Machine("cpu", WallTimer(lambda: self.now))
        return run_bench("fake", parts, asked, machine=machine, clock=lambda: self.now, say=self.lines.append)


def test_a_record_comes_back_from_json_as_it_went(bench):
    outcome = bench.run([bench.part("a", size=3), bench.part("b")])
    assert Record.from_json(outcome.record.to_json()) == outcome.record
    assert load_record(outcome.path, "fake", outcome.record.device) == outcome.record
    assert "\n" not in outcome.record.to_json()


def test_a_second_run_measures_only_what_is_not_on_record(bench):
    a, b = bench.part("a"), bench.part("b")
    bench.run([a])
    bench.run([a, b])
    assert bench.ran == ["b"]
    bench.run([a, b], again=True)
    assert bench.ran == ["a", "b"]


def test_gpu_session_budget_stops_next_goes_on(bench):
    """The budget stops between parts and the next run goes on."""
    parts = [bench.part("first"), bench.part("long", minutes=5), bench.part("short"), bench.part("last")]
    outcome = bench.run(parts, minutes=2.5)
    assert bench.ran == ["first", "short"]
    assert list(outcome.stale) == ["long", "last"]
    outcome = bench.run(parts, minutes=10)
    assert bench.ran == ["long", "last"]
    assert not outcome.stale


def test_each_part_is_on_disk_the_moment_it_ends(bench):
    a = bench.part("a")
    with pytest.raises(KeyboardInterrupt):
        bench.run([a, bench.part("b", error=KeyboardInterrupt())])
    (path,) = bench.results.rglob("*.json")
    assert list(json.loads(path.read_text())["parts"]) == ["a"]
    assert any("interrupted in b" in line for line in bench.lines)


def test_bench_failing_part_keeps_old_record(bench):
    """A failing part costs neither the others nor its own old record."""
    bench.run([bench.part("a"), bench.part("b")])
    broken = bench.part("a", error=RuntimeError("out of memory"), size=9)
    outcome = bench.run([broken, bench.part("c")])
    assert outcome.failed == {"a": "RuntimeError: out of memory"}
    assert set(outcome.record.parts) == {"a", "b", "c"}
    assert outcome.record.parts["a"].config == {}


def test_gpu_session_part_stale_when_inputs_changed(bench):
    """A part is stale when what its numbers depend on changed."""
    part = bench.part("a", size=1)
    record = bench.run([part]).record
    old = record.parts["a"]
    now, code = old.environment, old.code
    assert stale(record, part, now, code) is None
    assert stale(record, bench.part("a", size=2), now, code) == "its configuration changed"
    assert stale(record, part, now, "other") == "the code changed"
    newer = dataclasses.replace(now, versions=now.versions | {"torch": "99"})
    assert stale(record, part, newer, code) == "the versions changed"
    elsewhere = dataclasses.replace(now, commit="f00", dirty=True, load=7.0, date="2030-01-01T00:00:00Z")
    assert stale(record, part, elsewhere, code) is None


def test_another_number_of_threads_is_another_measurement(bench):
    part = bench.part("a", size=1)
    bench.run([part])
    outcome = bench.run([part], threads=2)
    assert bench.ran == ["a"]
    assert outcome.record.parts["a"].config == {"size": 1, "threads": 2}
    assert outcome.record.parts["a"].rows[0].extra == {"size": 1}


def test_record_write_failing_keeps_old(bench, monkeypatch):
    """A write that fails leaves the old record and nothing else."""
    outcome = bench.run([bench.part("a")])
    before = outcome.path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        outcome.record.save(outcome.path)
    assert outcome.path.read_bytes() == before
    assert list(outcome.path.parent.iterdir()) == [outcome.path]


def test_a_number_that_is_not_one_is_never_recorded(bench):
    bad = Part("a", lambda machine: [Row("a", "ours", extra={"loss": float("nan")})])
    outcome = bench.run([bad, bench.part("b")])
    assert list(outcome.failed) == ["a"] and "JSON" in outcome.failed["a"]
    assert list(load_record(outcome.path, "fake", outcome.record.device).parts) == ["b"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": 1}', '{"schema": 1, "parts": {"a": {}}, "bench": "", "device": ""}']
)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"train\.json is no bench record"):
        load_record(path, "train", "here")


def test_a_record_of_another_schema_is_begun_anew(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"schema": 0, "whatever": 1}')
    assert load_record(path, "train", "here") == Record("train", "here")


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("fp8", ["fp8"]),
        ("compiled", ["fp8 compiled"]),
        ("fp8*", ["fp8", "fp8 compiled"]),
        ("", ["fp8", "fp8 compiled", "bf16"]),
    ],
)
def test_only_selects_parts_by_name_or_pattern(bench, only, names):
    """Only names a part exactly or by what it contains or matches."""
    bench.run([bench.part("fp8"), bench.part("fp8 compiled"), bench.part("bf16")], only=only)
    assert bench.ran == names


def test_only_that_names_no_part_says_which_there_are(bench):
    with pytest.raises(ValueError, match=r"--only is 'int4', which names no part; there are: fp8, bf16"):
        bench.run([bench.part("fp8"), bench.part("bf16")], only="int4")


def test_fingerprint_follows_sources(tmp_path, monkeypatch):
    """The fingerprint follows the sources and nothing else."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for name in ("kernels/a.py", "kernels/a.md", "tokenizer/b.py", "tokenizer/c.py", "bench/speed.py", "bench/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")

    rooms = ("kernels", "tokenizer/c.py")

    def changed(name: str) -> bool:
        before = environment.fingerprint("speed", rooms)
        (tmp_path / name).write_text("2")
        return environment.fingerprint("speed", rooms) != before

    assert changed("kernels/a.py")
    assert changed("bench/speed.py") and changed("tokenizer/c.py")
    assert not any(map(changed, ("kernels/a.md", "tokenizer/b.py", "bench/x.py")))


def test_the_environment_says_what_a_number_depends_on():
    now = environment.capture("cpu")
    assert now.cores >= 1 and now.threads >= 1
    assert now.versions["python"].startswith("3.")
    assert now.device == environment.slug(now.device)
    assert now.gpu is None


def test_work_of_other_processes_is_told_from_our_own(monkeypatch):
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(environment.time, "monotonic", iter([100.0, 110.0]).__next__)
    monkeypatch.setattr(environment, "_busy_seconds", iter([50.0, 70.0]).__next__)
    monkeypatch.setattr(environment.os, "times", iter([(1, 1, 0, 0, 0), (8, 4, 0, 0, 0)]).__next__)
    assert environment.OtherWork().share() == (20 - 10) / (4 * 10)
