"""What a user can mend, told apart from a defect of this program."""


class UserError(ValueError):
    """One line that names the file or option, the value and the remedy.

    At the terminal it is that line and exit code 2. Any other error, but for an ``OSError``, is a defect of Folio: a
    traceback, and exit code 1.
    """
