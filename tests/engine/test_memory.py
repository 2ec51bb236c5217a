"""Memory that is freed: kept for what comes next, or given back."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from warploom.engine.memory import keep_freed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
@pytest.mark.unsanitized("its allocator is not glibc's")
def test_freed_memory_is_kept_on_request():
    def resident_mb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    try:
        keep_freed(True)
        pieces = [torch.ones(2 << 20) for _ in range(40)]
        taken = resident_mb()
        del pieces
        assert resident_mb() > taken - 20
    finally:
        keep_freed(False)
    assert resident_mb() < taken - 300
