"""What can go wrong, as the words the person at the keyboard reads.

Exit codes: 0 after a clean stop, 1 after a `Failure`, 2 after a `UsageFailure` (and argparse's own refusals).
"""

from __future__ import annotations


class Failure(Exception):
    """The server cannot start or go on; the message says why and, where there is one, what to do about it.

    Attributes:
        logs: The last lines of each log, by file name.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.logs: dict[str, list[str]] = {}


class UsageFailure(Failure):
    """The command line asks for something that is not there; nothing was started."""

    exit_code = 2


class Interrupted(Exception):
    """A signal asked the server to stop before it was ready: a clean stop, not a failure."""
