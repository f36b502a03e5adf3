"""Serve every archive of the model store until Ctrl-C.

    python -m server
    python -m server --models cifar,digits --rest-port 8080 --grpc-port 7070 --device cpu

Exit status: 0 after a clean stop, 1 after a failure (reported on standard error), 2 for a wrong command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from server.arguments import parse
from server.failures import Failure, Interrupted
from server.launcher import Launcher, Signals
from server.reporting import Reporter, drop_unwritten


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server and return the exit status."""
    settings = parse(arguments)
    signals, reporter = Signals(), Reporter(as_json=settings.log_format == "json")
    try:
        Launcher(settings, signals, reporter).run()
    except Failure as failure:
        fields: dict[str, Any] = {"logs": failure.logs} if failure.logs else {}
        reporter.say(str(failure), level="error", **fields)
        return failure.exit_code
    except Interrupted:
        reporter.say("stopped before it was ready")
        return 0
    return 1 if signals.kill() else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        drop_unwritten()
