"""The number of threads under a container's quota."""

import os

import pytest

from warploom.engine.serving.execution import kv_cache
from warploom.tokenizer import cpus
from warploom.tokenizer.base import default_threads

V1 = "4:memory:/docker/a1\n2:cpu,cpuacct:/docker/a1\n0::/\n"
GROUP = "cpu,cpuacct/docker/a1/cpu."


@pytest.mark.parametrize(
    ("membership", "files", "threads"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/pod/app\n", {"pod/cpu.max": "300000 100000\n", "pod/app/cpu.max": "max 100000\n"}, 3),
        ("0::/pod/app\n", {"pod/cpu.max": "300000 100000\n", "pod/app/cpu.max": "200000 100000\n"}, 2),
        ("2:cpu:/\n0::/pod\n", {"unified/pod/cpu.max": "400000 100000\n"}, 4),
        (
            V1,
            {GROUP + "cfs_quota_us": "150000", GROUP + "cfs_period_us": "50000"},
            3,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("2:memory:/\n", {"memory/cpu.max": "100000 100000"}, 8),
        ("0::/\n", {"cpu.max": "many\n"}, 8),
        (None, {}, 8),
    ],
)
def test_cpus_follow_quota(tmp_path, monkeypatch, membership, files, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert cpus.available_cpus(tmp_path, tmp_path / "membership") == threads


def test_quota_is_read_once(tmp_path):
    """It was read with every text tokenized: 15,000 messages took 4.6 s of CPU time instead of 0.25."""
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "membership").write_text("0::/\n")
    before = cpus.available_cpus(tmp_path, tmp_path / "membership")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert before == cpus.available_cpus(tmp_path, tmp_path / "membership") == 1


def test_threads_and_workers_keep_quota(monkeypatch):
    """The tokenizer's threads and the C++ engine's are counted by it."""
    monkeypatch.setattr("warploom.tokenizer.base.available_cpus", lambda: 3)
    assert default_threads(None) == 3 and default_threads(7) == 7
    asked = []
    monkeypatch.setattr(kv_cache, "HAS_NATIVE", True)
    monkeypatch.setattr(kv_cache, "_native", type("Native", (), {"set_threads": asked.append}))
    monkeypatch.setattr(kv_cache.torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(kv_cache, "available_cpus", lambda: 2)
    kv_cache.set_threads()
    assert asked == [2]
