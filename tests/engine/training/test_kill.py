"""Kill the process at random moments, resume, and end with the bits of a run that nobody touched.

`warploom bench kills` is the long version.
"""

import dataclasses

import pytest

from warploom.bench.kills import digest, processes, run_killed, run_once

KILLS = 5


@pytest.mark.timeout(300)
def test_killed_run_ends_with_same_bits(tiny, monkeypatch):
    """A run killed at random moments ends with the same bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = {**tiny().model, "dropout": 0.1}
    whole = tiny("whole", model=model, steps=8 * KILLS, save_every=3, eval_every=9, dtype="bfloat16")
    run_once(processes(), whole)
    kills = []
    while max(kills, default=0) < 0.6 * KILLS:  # on a busy machine a run may end before its killer looks again
        assert len(kills) < 4, kills
        killed = dataclasses.replace(whole, out=whole.out.replace("whole", f"killed-{len(kills)}"))
        kills.append(len(run_killed(processes(), killed, KILLS)))
        assert digest(killed) == digest(whole)
