"""Errors that users cause: one sentence and exit code 2, no traceback."""

MISTAKES = (ValueError, FileNotFoundError, IsADirectoryError, PermissionError)
