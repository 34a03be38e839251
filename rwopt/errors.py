"""The one error that bad input raises."""


class UserError(Exception):
    """A mistake that the user can mend: one line that names the thing, its value and the remedy.

    The command line prints it without a traceback and exits with 2.
    """
