"""Kill the process at random moments, resume, and end with the bits of a run that nobody touched.

`warploom bench kills` is the long version.
"""

import pytest

from tests.processes import kill
from warploom.bench.kills import digest, processes, run_once

KILLS = 5


@pytest.mark.timeout(300)
def test_killed_run_ends_with_same_bits(tiny, monkeypatch):
    """A run killed at random moments ends with the same bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = {**tiny().model, "dropout": 0.1}
    whole = tiny("whole", model=model, steps=8 * KILLS, save_every=3, eval_every=9, dtype="bfloat16")
    run_once(processes(), whole)
    assert digest(kill(processes(), whole, KILLS, least=3)) == digest(whole)
