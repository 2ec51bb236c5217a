"""Errors that users cause: one sentence and exit code 2, no traceback."""

import errno
import os
import re

from ..tokenizer.errors import InputError

__all__ = ["USER_ERRORS", "InputError", "describe_error", "refuse_below"]

USER_ERRORS = (InputError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
OF_FILES = {
    errno.ENOENT: "does not exist",
    errno.EEXIST: "exists already and is a file: a directory is needed there",
    errno.EISDIR: "is a directory: a file is needed there",
    errno.ENOTDIR: "is not in a directory: a part of the path is a file",
    errno.EACCES: "may not be read or written by this user",
    errno.EPERM: "may not be read or written by this user",
    errno.EROFS: "is on a file system that is read-only: choose another place",
    errno.ENOSPC: "does not fit on the disk: make room or choose another place",
    errno.EDQUOT: "is more than this user's share of the disk: make room or choose another place",
    errno.ENAMETOOLONG: "has a name that is too long",
}


def describe_error(error: Exception) -> str | None:
    """The sentence for an error that a user caused; None for others, which are bugs."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) if isinstance(error, USER_ERRORS) else None
    if error.errno not in OF_FILES:
        return None
    path = os.fspath(error.filename2 or error.filename or "what is written")
    shown = re.sub(r"\.([^/]+)\.\d+\.partial(?=/|$)", r"\1", str(path))  # what is unfinished has a name of its own
    return f"{shown} {OF_FILES[error.errno]}"


def refuse_below(least: int, **counts: int | None) -> None:
    """Raise an InputError for settings below `least`, by name; None passes."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise InputError(f"{name} must be at least {least}, got {count}")
