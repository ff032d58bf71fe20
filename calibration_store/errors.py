"""What a user is told in one line. Nothing here knows of a command line: exit codes are what a stage ends with."""


class UserError(Exception):
    """Something that its reader can mend; the message is one line that says what is wrong, where, and what to do."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message


class StoreError(UserError):
    """A file or folder is not what it should be."""


class WriteError(StoreError):
    """A file could not be written; what was complete before stays complete."""

    exit_code = 1


class OptionError(UserError):
    """An option's value cannot be: alone, beside another, or with this model."""
