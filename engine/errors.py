"""What counts as a mistake of whoever called: one sentence and exit code 2, no traceback."""

MISTAKES = (ValueError, FileNotFoundError, IsADirectoryError, PermissionError)
