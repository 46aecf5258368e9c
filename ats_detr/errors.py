"""Errors that a user can fix: printed in one line, without a traceback."""


class UserError(ValueError):
    """Invalid input or environment. The message names the cause, its value and the fix."""


class Stopped(Exception):
    """The run stopped on a signal, with its checkpoint written. The message says how to resume."""

    def __init__(self, message: str = "", *, exit_code: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
