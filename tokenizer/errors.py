"""`InputError`, the error that users cause. It lives in the lowest package, so that every other can raise it."""


class InputError(ValueError):
    """Invalid input: one sentence that names it, its value, and the fix.

    The command line prints it and exits 2, the server answers 400. Any other ValueError is a bug of ours, and looks
    like one: a traceback, a 500.
    """
