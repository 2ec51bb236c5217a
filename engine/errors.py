"""Errors that users cause: one sentence and exit code 2, no traceback."""

from ..tokenizer.errors import InputError

__all__ = ["USER_ERRORS", "InputError", "refuse_below"]

USER_ERRORS = (InputError, FileNotFoundError, IsADirectoryError, PermissionError)


def refuse_below(least: int, **counts: int | None) -> None:
    """Raise an InputError for settings below `least`, by name; None passes."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise InputError(f"{name} must be at least {least}, got {count}")
