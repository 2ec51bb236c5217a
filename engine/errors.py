"""Errors that users cause: one sentence and exit code 2, no traceback."""

from ..tokenizer.errors import InputError

__all__ = ["USER_ERRORS", "InputError"]

USER_ERRORS = (InputError, FileNotFoundError, IsADirectoryError, PermissionError)
