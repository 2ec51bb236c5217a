"""The error that users cause. It lives on the ground floor, so that every room above can raise it."""


class InputError(ValueError):
    """Something that was given cannot be used: one sentence names it, its value, and what to do.

    The command line prints it and exits 2, the server answers 400. Any other ValueError is a bug of ours, and looks
    like one: a traceback, a 500.
    """
