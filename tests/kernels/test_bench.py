"""The kernels bench, as far as a machine without a GPU can tell."""

import dataclasses

import pytest
import torch

from warploom.bench import kernels as bench
from warploom.bench.harness import Machine
from warploom.kernels import Case, ops, rms_norm, tuned, tuning
from warploom.kernels.lang import HAS_TRITON, INTERPRET

interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs triton and TRITON_INTERPRET=1")


def test_without_a_gpu_budgets_are_printed_and_nothing_is_timed(monkeypatch, capsys):
    printed = []
    monkeypatch.setattr(bench, "print_budgets", lambda: printed.append(True))
    assert bench.parts(bench.Options(device="cpu")) == []
    assert printed and "no GPU here" in capsys.readouterr().err


def test_on_a_gpu_every_op_is_checked_before_it_is_timed_and_the_important_ones_come_first():
    names = [part.name for part in bench.parts(bench.Options(device="cuda"))]
    assert names[:4] == ["right: attention", "attention forward", "attention both", "right: linear_cross_entropy"]
    assert {name.removeprefix("right: ") for name in names if name.startswith("right: ")} == {
        op.name for op in ops() if op.fused is not None
    }


@interpreted
def test_a_check_passes_for_a_right_twin_and_names_what_is_wrong_with_another(monkeypatch):
    monkeypatch.setattr(rms_norm, "cases", rms_norm.cases[:2])
    machine = Machine("cpu")
    assert bench.check(machine, "rms_norm")[0].extra == {"checks": 2, "wrong": 0}
    monkeypatch.setattr(rms_norm, "fused", lambda *args: 2 * rms_norm.reference(*args))
    with pytest.raises(AssertionError, match="rms_norm is wrong: tail"):
        bench.check(machine, "rms_norm")


@interpreted
def test_a_large_case_is_timed_forward_and_both_ways_beside_eager_and_compiled(monkeypatch):
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


def test_tuning_climbs_to_the_fastest_settings_and_files_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FILE", tmp_path / "tuned.json")
    tuned._table.cache_clear()
    used = {}

    def step():
        used.update(tuned.tuned("toy", torch.device("cpu"), 64, {"BLOCK": 256, "num_warps": 4}))

    class Timer:
        def sample(self, call, calls):
            call()
            return 1 + abs(used["BLOCK"] - 1024) + abs(used["num_warps"] - 8)

    ((kernel, before, after, settings),) = tuning.search(step, Timer(), torch.device("cpu"))
    assert (kernel, settings) == ("toy", {"BLOCK": 1024, "num_warps": 8}) and after < before
    tuned._table.cache_clear()
    step()
    assert used == settings
    tuned._table.cache_clear()


def test_options_keep_the_flags_of_every_bench():
    names = {field.name for field in dataclasses.fields(bench.Options)}
    assert {"budgets", "tune", "dtype", "minutes", "results", "only"} <= names
