"""Errors that a user is told in one line.

Nothing here knows of a command line: `exit_code` is what the process of a stage ends with.
"""


class UserError(Exception):
    """An error that the reader of its message can mend.

    The message is one line that says what is wrong, where, and what to do. A name out of a file may hold line breaks and
    other characters that are not printable; they are shown as Python writes them (\\n).
    """

    exit_code = 2

    def __init__(self, message: str):
        shown = message.isprintable()
        self.message = message if shown else "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(self.message)


class StoreError(UserError):
    """A file or a folder that is not what it should be."""


class WriteError(StoreError):
    """A file that could not be written; files that were complete before stay complete."""

    exit_code = 1


class OptionError(UserError):
    """An option's value that cannot be used: alone, beside another option, or with this model."""
