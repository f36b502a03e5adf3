"""Serve every archive of the model store in KServe's model server until Ctrl-C.

    python -m server.kserve
    python -m server.kserve --models cifar,digits --http-port 8085 --grpc-port 8086 --device cpu

Exit status: 0 after a clean stop, 1 after a failure (reported on standard error), 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from server import arguments as shared
from server.arguments import Settings
from server.configuration import METRICS_VARIABLES
from server.failures import Failure
from server.models import describe_trust, find_archives
from server.reporting import Reporter, drop_unwritten


def parse(given: Sequence[str] | None = None) -> Settings:
    """Parse the command line.

    Args:
        given: The command line without the program; None for the process's own.

    Raises:
        SystemExit: The command line is wrong (status 2) or asks for help (status 0).
    """
    parser = argparse.ArgumentParser(
        prog="python -m server.kserve",
        description="Serve every archive of the model store in KServe's model server, over REST and gRPC: the Open "
        "Inference Protocol v2, and the contract of proto/.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shared.add_shared(parser)
    add = parser.add_argument
    add("--http-port", type=shared.port, default=8085, metavar="PORT", help="REST and metrics; 0 takes a free port")
    add("--grpc-port", type=shared.port, default=8086, metavar="PORT", help="gRPC; 0 takes a free port")
    add(
        "--timeout-s",
        type=shared.seconds,
        default=60.0,
        metavar="S",
        help="to a response, from the request's headers",
    )
    values = vars(parser.parse_args(given))
    http_port = values.pop("http_port")
    if http_port and http_port == values["grpc_port"]:
        parser.error("--http-port and --grpc-port must differ")
    return replace(shared.parse([]), **values, rest_port=http_port, patch=False)


def main() -> int:
    """Run the server and return the exit status."""
    settings = parse()
    reporter = Reporter(as_json=settings.log_format == "json")
    try:
        signers = settings.require_signature
        found = find_archives(settings.model_store, settings.models, signers)
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

        return 0 if run(settings, found, reporter) else 1
    except Failure as failure:
        reporter.say(str(failure), level="error")
        return failure.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        drop_unwritten()
