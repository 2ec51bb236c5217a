"""The kernels bench, as far as a machine without a GPU can tell."""

import dataclasses
import json

import pytest
import torch

from warploom.bench import kernels as bench
from warploom.bench.harness import Machine
from warploom.kernels import Case, adamw_step, ops, rms_norm
from warploom.kernels.core import tuned
from warploom.kernels.core.lang import HAS_TRITON, INTERPRET
from warploom.kernels.tools import tuning

interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs triton and TRITON_INTERPRET=1")


def test_no_gpu_budgets_printed_none_timed(monkeypatch, capsys):
    """Without a gpu budgets are printed and nothing is timed."""
    printed = []
    monkeypatch.setattr(bench, "print_budgets", lambda names: printed.append([*names]))
    assert bench.parts(bench.Options(device="cpu")) == bench.parts(bench.Options(device="cpu", only="rms_norm")) == []
    assert len(printed[0]) > 20 and sorted(printed[1]) == ["add_rms_norm", "rms_norm"]
    assert "no GPU here" in capsys.readouterr().err


def test_gpu_session_checks_before_timing():
    """On a gpu every op is checked before it is timed and the important ones come first."""
    names = [part.name for part in bench.parts(bench.Options(device="cuda"))]
    assert names[:4] == ["right: attention", "attention forward", "attention both", "right: linear_cross_entropy"]
    assert {name.removeprefix("right: ") for name in names if name.startswith("right: ")} == {
        op.name for op in ops() if op.fused is not None
    }


@interpreted
def test_verify_right_passes_wrong_is_named(monkeypatch):
    """A check passes for a right twin and names what is wrong with another."""
    monkeypatch.setattr(rms_norm, "cases", rms_norm.cases[:2])
    machine = Machine("cpu")
    assert bench.check(machine, "rms_norm")[0].extra == {"checks": 2, "wrong": 0}
    monkeypatch.setattr(rms_norm, "fused", lambda *args: 2 * rms_norm.reference(*args))
    with pytest.raises(AssertionError, match="rms_norm is wrong: tail"):
        bench.check(machine, "rms_norm")


@interpreted
def test_large_case_timed_beside_eager_and_compiled(monkeypatch):
    """A large case is timed forward and both ways beside eager and compiled."""
    case = Case("small", lambda m: (m.normal(4, 64), m.normal(64)), bench=True)
    monkeypatch.setattr(rms_norm, "cases", [rms_norm.cases[0], case])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    machine = Machine("cpu", rounds=3, seconds=0.1)
    machine.ceilings["copy"] = 1e10
    for pass_, moved in (("forward", 2 * 512), ("both", 5 * 512)):
        rows = {row.who: row for row in bench.compare(machine, "rms_norm", pass_, "bfloat16")}
        assert {"ours", "torch eager", "torch.compile"} <= {who for who, row in rows.items() if row.seconds}
        ours = rows["ours"]
        assert ours.rate == pytest.approx(moved / ours.seconds.median)
        assert ours.limits["copy"] == pytest.approx(ours.rate / 1e10)
        assert ours.extra["host_us"] > 0


@pytest.fixture
def no_table(tmp_path, monkeypatch):
    """An empty table of tuned settings, which what a test finds goes to."""
    monkeypatch.setattr(tuned, "FILE", tmp_path / "tuned.json")
    tuned._table.cache_clear()
    yield
    tuned._table.cache_clear()


class Timer:
    """Seconds are a function of the settings that the last call used."""

    def __init__(self, seconds):
        self.seconds = seconds

    def sample(self, call, calls):
        call()
        return self.seconds()


def test_tuning_files_fastest_nearby(no_table):
    """Tuning finds the fastest settings nearby and files them."""
    used, default = {}, {"BLOCK": 512, "num_warps": 4, "num_stages": 2}

    def step():
        used.update(tuned.tuned("toy", torch.device("cpu"), 64, default))

    def seconds():
        return 1 + abs(used["BLOCK"] - 1024) + abs(used["num_warps"] - 8)

    done = set()
    ((kernel, before, after, settings),) = tuning.search(step, Timer(seconds), torch.device("cpu"), done=done)
    assert (kernel, settings) == ("toy", {"BLOCK": 1024, "num_warps": 8, "num_stages": 2}) and after < before
    tuned._table.cache_clear()
    step()
    assert used == settings
    assert not list(tuning.search(step, Timer(seconds), torch.device("cpu"), done=done))


def test_a_search_is_small_enough_for_a_few_minutes():
    found = tuning.candidates({"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2})
    assert found[0] == {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    assert len(found) == 33 == len({tuple(one.values()) for one in found})


@interpreted
def test_op_tuned_to_file_spills_never_timed(no_table, monkeypatch):
    """The compiler sees the large case, the fake clock a small one of the same name: it likes few threads best."""
    small = Case(adamw_step.cases[-1].name, adamw_step.cases[3].make, bench=True)
    monkeypatch.setattr(adamw_step, "cases", [*adamw_step.cases[:-1], small])
    monkeypatch.setattr(bench, "architecture", lambda device: 90)
    default, spilling, impossible = ({"BLOCK": b, "num_warps": w} for b, w in ((2048, 8), (4096, 1), (1000, 2)))
    monkeypatch.setattr(
        tuning, "candidates", lambda _: [default, spilling, impossible, {"BLOCK": 1024, "num_warps": 4}]
    )
    timed = []

    def seconds():
        timed.append(tuned._trial["adamw_step"])
        return timed[-1]["num_warps"]

    (row,) = bench.tune(Machine("cpu", Timer(seconds)), "adamw_step", "bfloat16")
    assert spilling not in timed and impossible not in timed
    filed = json.loads(tuned.FILE.read_text())["none"]["adamw_step"]["any"]
    assert filed == {"BLOCK": 1024, "num_warps": 4} and str(filed) == row.extra["settings"]
    assert (row.extra["default_seconds"], row.extra["best_seconds"]) == (8, 4)


def test_options_keep_the_flags_of_every_bench():
    names = {field.name for field in dataclasses.fields(bench.Options)}
    assert {"budgets", "tune", "dtype", "minutes", "results", "only"} <= names
