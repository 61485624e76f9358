"""The error for a user's mistake; any other exception is a defect of Folio."""


class UserError(ValueError):
    """One line that names the file or option, the value and the remedy.

    The terminal shows that line, and the exit code is 2; an ``OSError`` is treated the same. Any other error shows a
    traceback, with exit code 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
