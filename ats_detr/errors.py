"""Mistakes a user can make and mend: shown as one line, without a traceback."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something outside the program is wrong. The message names the culprit and what to do about it."""


class Stopped(Exception):
    """Somebody asked the program to stop, and it did so in order. The message says how to go on."""


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; a UserError or a full disk ends the process with one line on stderr and exit code 2.

    Of the processes of torchrun only the first speaks, if it made the same mistake: the others give it five seconds, in
    which torchrun ends them.

    Stopped ends it with a line on stdout and exit code 0: a launcher must not take it for a failure and start it again.

    Everything else keeps its traceback: it is a bug, and the traceback is what a report needs.
    """
    try:
        main()
    except UserError as error:
        _end(str(error))
    except Stopped as end:
        if os.environ.get("RANK", "0") == "0":
            print(end)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(f"no space left for {error.filename or 'a file'}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
