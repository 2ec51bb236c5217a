"""Checkpoints: atomic, asynchronous, verified by hash; everything the next step depends on.

A run is a function of its last step's state, so a checkpoint that holds all of it makes a killed run end exactly as an
uninterrupted one would. `checkpoints/step-N/` holds

    model.safetensors config.json tokenizer.json   a model directory like any other: the weights, float32
    optimizer.pt                                   the optimizer's state
    scheduler.pt                                   loss scale, averaged weights, generators' states
    state.json                                     step, counters, and the SHA-256 of every file above

Where weights are sharded over processes, `shards/` replaces the model directory and the moments (`dcp.py`).

It is written under another name, flushed to disk, and renamed: a name `step-N` means a complete checkpoint. A file that
was torn or changed afterwards no longer matches its hash, and the checkpoint before it is used instead. Writing happens
in a thread on copies of the tensors, so that training waits for a copy and not for a disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from ...tokenizer.sources import atomic_writer, replace_directory
from ..data.tokens import file_hash
from ..errors import InputError


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, path_or_file: str | os.PathLike | BinaryIO
) -> None:
    """Save weights, optimizer and step to one file, for custom loops. A path is replaced atomically."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    if not isinstance(path_or_file, (str, os.PathLike)):
        torch.save(state, path_or_file)
        return
    with atomic_writer(path_or_file) as file:
        torch.save(state, file)


def load_checkpoint(
    path_or_file: str | os.PathLike | BinaryIO, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Restore what `save_checkpoint` wrote; returns the step."""
    try:
        state = torch.load(path_or_file, map_location="cpu", weights_only=True)
        weights, moments, step = state["model"], state["optimizer"], state["step"]
    except (RuntimeError, EOFError, KeyError, TypeError, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"{path_or_file} is no checkpoint: {str(error).splitlines()[0]}") from error
    model.load_state_dict(weights)
    if optimizer is not None:
        optimizer.load_state_dict(moments)
    return step


def rng_state() -> dict[str, Any]:
    """State of every random generator (Python, NumPy, torch, CUDA), as tensors and numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():  # of this process's GPU only: a resumed run may have fewer GPUs
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng_state(states: dict[str, Any]) -> None:
    """Restore the generators from `rng_state`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def snapshot(value: Any) -> Any:
    """Copy to the CPU, detached from later training steps."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(snapshot, value))
    return value


class Checkpoints:
    """The `checkpoints/` folder of a run: asynchronous saves, the last few kept, the last good one found.

    Where every process writes a part, the main process makes the whole appear.
    """

    def __init__(self, folder: Path, keep_last: int = 2, is_main: bool = True) -> None:
        self.folder, self.keep_last, self.is_main = folder, keep_last, is_main
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        state: dict[str, Any],
        *,
        write_model: Callable[[Path], None] | None = None,
        write_shards: Callable[[Path], dict[str, str]] | None = None,
    ) -> None:
        """Write `tensors` as NAME.pt and `state` as state.json, beside a model directory or shards, in the background.

        All of them must own what they write: copies, not live tensors. `write_shards` waits for those of all
        processes and tells their hashes.
        """
        self.wait()
        scratch = self.folder / f".step-{step}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)

        def write() -> None:
            try:
                self._write(step, scratch, write_model, write_shards, tensors, state)
            except BaseException as error:  # handed to the training thread, which raises it
                self._failure = error

        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is on disk; re-raise its error."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, step: int, scratch: Path, write_model, write_shards, tensors: dict, state: dict) -> None:
        try:
            comfort = "the one before it is intact" if self.steps() else "free some space: there is none before it"
            with saving(f"a checkpoint to {self.folder}", self.folder, comfort):
                hashes = write_shards(scratch) if write_shards else {}
                if not self.is_main:
                    return
                if write_model:
                    write_model(scratch)
                for name, value in tensors.items():
                    torch.save(value, scratch / f"{name}.pt")
                hashes |= {path.name: file_hash(path) for path in sorted(scratch.iterdir()) if path.is_file()}
                (scratch / "state.json").write_text(json.dumps({**state, "step": step, "sha256": hashes}, indent=1))
                for path in scratch.iterdir():
                    _flush(path)
                replace_directory(scratch, self.path(step))
                _flush(self.folder)
        except BaseException:
            if self.is_main:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        for old in self.steps()[self.keep_last :]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def latest(self, on_bad: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
        """Newest complete checkpoint and its state.json; damaged ones are reported to `on_bad` and skipped."""
        for step in self.steps():
            try:
                return self.path(step), verify(self.path(step))
            except InputError as error:
                on_bad(f"skipped a damaged checkpoint: {error}")
        return None


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its hash; return the state, or raise an InputError naming the file."""
    path = directory / "state.json"
    try:
        state = json.loads(path.read_text())
        hashes = state["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or unreadable") from error
    for name, expected in hashes.items():
        if not (directory / name).is_file() or file_hash(directory / name) != expected:
            raise InputError(f"{directory / name} is missing or not what was saved")
    return state


def load_tensors(directory: Path, name: str) -> Any:
    """Load NAME.pt of a checkpoint, memory-mapped."""
    return torch.load(directory / f"{name}.pt", map_location="cpu", weights_only=True, mmap=True)


def _flush(path: Path) -> None:
    """fsync a file or folder, where the system offers it."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_run(folder: Path) -> TextIO | None:
    """Take the file lock of a run's folder, held until `unlock_run` or the end of this process."""
    try:
        import fcntl
    except ImportError:  # there is none on Windows
        return None
    file = open(folder / ".lock", "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"out={folder} is in use by another run: wait for its end, or choose another out") from None
    except OSError:
        pass  # a file system without locks
    return file


def unlock_run(file: TextIO | None) -> None:
    """Release the lock and remove its file."""
    if file is not None:
        Path(file.name).unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def saving(what: str, folder: Path, comfort: str) -> Iterator[None]:
    """Context that turns failed writes (disk full …) into one sentence."""
    try:
        yield
    except Exception as error:
        full = shutil.disk_usage(folder).free < 1 << 20
        reason = "No space left on device" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"saving {what} failed: {reason}; {comfort}") from error
