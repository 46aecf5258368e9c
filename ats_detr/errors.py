"""Mistakes a user can make and mend: shown as one line, without a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something outside the program is wrong. The message names the culprit and what to do about it."""


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; a UserError or a full disk ends the process with one line on stderr and exit code 2.

    Everything else keeps its traceback: it is a bug, and the traceback is what a report needs.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: no space left for {error.filename or 'a file'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
