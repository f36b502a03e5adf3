"""The launcher's exceptions, whose messages are for the operator.

Exit codes: 0 after a clean stop, 1 after a `Failure`, 2 after a `UsageFailure` and after errors of argparse.
"""

from __future__ import annotations


class Failure(Exception):
    """The server cannot start or go on; the message says why and, if possible, what to do.

    Attributes:
        logs: The last lines of each log, by file name.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.logs: dict[str, list[str]] = {}


class UsageFailure(Failure):
    """The command line names something that does not exist; nothing was started."""

    exit_code = 2


class Interrupted(Exception):
    """A signal stopped the server before it was ready: a clean stop, not a failure."""
