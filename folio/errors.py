"""What a user can mend, told apart from a defect of this program."""


class UserError(ValueError):
    """One line that names the file or option, the value and the remedy.

    At the terminal it is that line and exit code 2. Any other error, but for an ``OSError``, is a defect of Folio: a
    traceback, and exit code 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
