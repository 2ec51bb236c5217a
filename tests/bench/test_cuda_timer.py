"""On a GPU every call starts with cold caches, and nothing is read before everything has run."""

from types import SimpleNamespace

import pytest
import torch

from warploom.bench import ceilings
from warploom.bench.timing import CudaTimer, host_seconds


class FakeCuda:
    """A stand-in for `torch.cuda` that logs what is asked of it; time passes only in calls."""

    def __init__(self):
        self.log, self.milliseconds = [], 0.0

    def current_device(self):
        return 0

    def get_device_properties(self, _):
        return SimpleNamespace(L2_cache_size=50 * 2**20)

    def synchronize(self):
        self.log.append("synchronize")

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                cuda.log.append("record")
                self.at = cuda.milliseconds

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def test_timing_sweeps_cache_before_each_call(monkeypatch):
    """Each call is timed alone after the cache was swept."""
    cuda = FakeCuda()

    def ones(count, device):
        assert count * 4 >= 4 * 50 * 2**20 and device == "cuda"
        return SimpleNamespace(sum=lambda: cuda.log.append("sweep"))

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "ones", ones)
    durations = iter([3.0, 9.0, 4.0])

    def call():
        cuda.log.append("call")
        cuda.milliseconds += next(durations)

    assert CudaTimer().sample(call, 3) == 0.004
    assert cuda.log == ["synchronize", *["sweep", "record", "call", "record"] * 3, "synchronize"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_timer_scales_with_bytes():
    """Twice the bytes take about twice as long and the host does not wait."""
    timer = CudaTimer()
    small, large = (torch.ones(count, device="cuda") for count in (2**27, 2**28))
    times = [min(timer.sample(lambda x=x: x.clone(), 10) for _ in range(5)) for x in (small, large)]
    assert 1.6 < times[1] / times[0] < 2.4
    assert host_seconds(large.clone, calls=20) < times[1]
    assert ceilings.measure("copy", "cuda", timer) < 1.2 * 2 * large.nbytes / times[1]
