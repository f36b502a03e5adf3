"""Serve every archive of the model store in KServe's model server until Ctrl-C.

    python -m server.kserve
    python -m server.kserve --models cifar,digits --http-port 8085 --grpc-port 8086 --device cpu

Exit status: 0 after a clean stop, 1 after a failure (reported on standard error), 2 for a wrong command line.
"""

from __future__ import annotations

import os
import sys

from server.configuration import METRICS_VARIABLES
from server.failures import Failure
from server.kserve.arguments import parse
from server.models import describe_trust, find_archives
from server.reporting import Reporter, drop_unwritten


def main() -> int:
    """Run the server and return the exit status."""
    asked = parse()
    reporter = Reporter(as_json=asked.settings.log_format == "json")
    try:
        signers = asked.settings.require_signature
        found = find_archives(asked.settings.model_store, asked.settings.models, signers)
        for sentence in describe_trust(found.archives, signers):
            reporter.say(sentence)
        for why in found.rejected.values():
            reporter.say(f"Archive rejected: {why}", level="error")
        # When kserve is imported, which takes a second, it reads the command line, and makes metrics of its own.
        # Through kubernetes it imports this package where it is installed: two seconds more, for what is not used here.
        sys.modules["kubernetes_validate"] = None  # type: ignore[assignment]  # Importing it fails.
        sys.argv[1:] = []
        for name in METRICS_VARIABLES:
            os.environ.pop(name, None)
        from server.kserve.host import run

        return 0 if run(asked, found, reporter) else 1
    except Failure as failure:
        reporter.say(str(failure), level="error")
        return failure.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        drop_unwritten()
