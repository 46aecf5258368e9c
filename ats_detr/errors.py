"""Errors that a user can fix: printed in one line, without a traceback."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from ats_detr.console import complain, say, use_utf8


class UserError(ValueError):
    """Invalid input or environment. The message names the cause, its value and the fix."""


class Stopped(Exception):
    """The run stopped on a signal, with its checkpoint written. The message says how to resume."""

    def __init__(self, message: str = "", *, exit_code: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_cli(main: Callable[[], None]) -> None:
    """Run `main` in UTF-8 and convert exceptions to exit codes.

    - UserError, or a file that cannot be read or written: one line on stderr, exit code 2. Under torchrun, ranks above
      0 wait five seconds before printing; if rank 0 has the same error, torchrun ends them within that time.
    - Stopped: one line on stdout, exit code 0, so that a launcher does not restart the run; after Ctrl-C 130.
    - KeyboardInterrupt: exit code 130.
    - All others are bugs and keep their traceback for a report.
    """
    use_utf8()
    try:
        main()
    except UserError as error:
        _end(str(error))
    except Stopped as end:
        if os.environ.get("RANK", "0") == "0":
            say(str(end))
        sys.exit(end.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(f"no space left for {error.filename or 'a file'}")
        if error.filename is None:
            raise
        _end(f"{os.fsdecode(error.filename)}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    complain(message)
    sys.exit(2)
