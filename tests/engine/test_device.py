"""What this machine is."""

import pytest
import torch

from warploom.engine.device import fast_bf16, measured_matmul_flops, memory_bytes, pick_device, pick_dtype


def test_auto_device_works_and_dtype_is_fast():
    """Auto is a device that works and the dtype it is fast in."""
    device = pick_device("auto")
    assert torch.ones(2, device=device).sum() == 2
    assert pick_dtype("auto", device) == (torch.bfloat16 if fast_bf16(device) else torch.float32)
    assert memory_bytes(device) > 2**28


def test_an_unknown_device_or_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="device 'gpu' is not known"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="dtype 'fp8' is not known; choose one of: auto, float32"):
        pick_dtype("fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA GPU here"):
            pick_device("cuda")


def test_the_matmul_peak_is_measured():
    rate = measured_matmul_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < rate < 1e15
