"""Environment of a measurement: everything it depends on besides the code under test (machine, load, versions,
sources).

Nothing here needs more than the standard library. torch is asked only where it is already imported or where a GPU
is to be found, so that benches of torch-free packages stay torch-free.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from ..engine.errors import InputError
from ..tokenizer.cpus import available_cpus
from .schema import Environment

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "kernels", "tokenizer", "csrc")
SOURCES = (".py", ".cpp", ".hpp", ".json")
PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "tiktoken")
X86_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
ARM_FLAGS = ("asimd", "sve", "sve2", "bf16", "i8mm")


def find_device(asked: str = "") -> str:
    """The device asked for, if available; by default `cuda` where torch sees a GPU, else `cpu`."""
    if asked not in ("", "cpu", "cuda"):
        raise InputError(f"device is {asked!r}; it must be cpu or cuda")
    if asked == "cpu":
        return asked
    if _sees_gpu():
        return "cuda"
    if asked:
        raise InputError("device is 'cuda', but torch sees no CUDA GPU here; use cpu")
    return "cpu"


def _sees_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def capture(device: str) -> Environment:
    """Capture the environment of a measurement on `device` (`cpu` or `cuda`)."""
    cpu, flags = _cpu()
    gpu = _gpu() if device == "cuda" else None
    commit, dirty = _commit()
    return Environment(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        device=slug(gpu) if gpu else f"{slug(cpu)}-{available_cpus()}-cores",
        cpu=cpu,
        cpu_flags=flags,
        cores=available_cpus(),
        threads=threads(),
        memory_bytes=_memory(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        gpu=gpu,
        driver=_driver() if gpu else None,
        platform=platform.platform(),
        versions=_versions(),
        commit=commit,
        dirty=dirty,
    )


def fingerprint(bench: str, rooms: tuple[str, ...] = ROOMS) -> str:
    """Hash of the sources that a benchmark's numbers depend on: its packages, its own file, the timing code.

    Unlike the commit it does not change with docs/ or with the results themselves, and it exists without git.
    """
    own = [ROOT / "bench" / f"{name}.py" for name in (bench, "timing", "ceilings")]
    rooms_files = [path for room in rooms for path in _below(ROOT / room) if path.suffix in SOURCES]
    digest = hashlib.sha256()
    for path in sorted(path for path in own + rooms_files if path.is_file()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _below(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("*"))


def slug(name: str) -> str:
    """Folder name of a device: `AMD EPYC 9B45` → `amd-epyc-9b45`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") or "unknown"


class OtherWork:
    """Load by other processes since this object was made (Linux)."""

    def __init__(self) -> None:
        self.begin, self.all, self.own = time.monotonic(), _busy_seconds(), sum(os.times()[:4])

    def share(self) -> float | None:
        """CPU time of other processes over the time of all cores."""
        busy = _busy_seconds()
        if busy is None or self.all is None:
            return None
        theirs = busy - self.all - (sum(os.times()[:4]) - self.own)
        had = (time.monotonic() - self.begin) * (os.cpu_count() or 1)
        return round(min(1.0, max(0.0, theirs / had)), 3) if had > 0 else None


def _busy_seconds() -> float | None:
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def threads() -> int:
    """Number of torch's operator threads; an estimate before torch is loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or available_cpus())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@cache
def _cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return name[1].strip() if name else platform.machine(), [flag for flag in X86_FLAGS + ARM_FLAGS if flag in present]


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


@cache
def _driver() -> str | None:
    answer = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> tuple[str | None, bool | None]:
    """Git commit; without git, from WARPLOOM_COMMIT."""
    commit = _ask("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return os.environ.get("WARPLOOM_COMMIT"), None
    status = _ask("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return commit.strip(), bool(status and status.strip())


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
