"""Usable CPUs of this process: its affinity mask and cgroup quota (a container's CPU limit).

Threads beyond a quota are not slower but stopped: once its share of a period (100 ms) is used up, all of them wait for
the next. A quota of 2.5 processors is two threads, since pools spin while they wait.
"""

import os
from functools import lru_cache
from pathlib import Path


def available_cpus(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs of the affinity mask, or fewer under a cgroup quota; at least one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, int(cpu_quota(groups, membership))))


@lru_cache(maxsize=16)
def cpu_quota(groups: Path, membership: Path) -> float:
    """Smallest quota of this process's cgroups and their parents, in CPUs; without one, more than any machine has.
    Version 2 has it in `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`.

    Read once: it is asked for with every text that is tokenized, and a dozen files take longer than a message's tokens.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return 1 << 20
    quotas = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            roots = [groups, groups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [groups / controllers, groups / "cpu"]
        else:
            continue
        inside = Path(path.lstrip("/"))  # of the host, where a container sees its own group as the root
        quotas += [_quota_of(root / part) for root in roots for part in (inside, *inside.parents)]
    return min(quotas, default=1 << 20)


def _quota_of(group: Path) -> float:
    """Quota of one cgroup."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period, *_ = " ".join((group / name).read_text() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else 1 << 20
        except (OSError, ValueError, ZeroDivisionError):  # not there, "max", or nothing that one can read
            continue
    return 1 << 20
