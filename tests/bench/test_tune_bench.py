"""The tuning bench compares the same step: one loss before it, to the digits of float32."""

import pytest

from warploom.bench.harness import Machine
from warploom.bench.tune import duel

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1}


@pytest.mark.parametrize("lora", [None, 4])
def test_tune_bench_first_loss_equals_trl(lora):
    for name in ("trl", "peft", "datasets"):
        pytest.importorskip(name)
    ours, theirs = duel(Machine("cpu", rounds=1, seconds=1), 4, lora, **TINY)
    assert theirs.missing is None and theirs.who == ("TRL with PEFT" if lora else "TRL")
    assert ours.extra["loss"] == pytest.approx(theirs.extra["loss"], abs=1e-5) and ours.rate > 0
