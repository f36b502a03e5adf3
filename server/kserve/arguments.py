"""The command line of `python -m server.kserve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from server import arguments as shared
from server.arguments import Settings


class Asked(NamedTuple):
    """The settings of the server.

    Attributes:
        settings: The settings that both hosts have; `rest_port` is the HTTP port.
        timeout_s: Seconds to a response, from the headers of a REST request or the complete message of a gRPC one.
    """

    settings: Settings
    timeout_s: float


def parse(given: Sequence[str] | None = None) -> Asked:
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
    http_port, timeout_s = values.pop("http_port"), values.pop("timeout_s")
    if http_port and http_port == values["grpc_port"]:
        parser.error("--http-port and --grpc-port must differ")
    return Asked(replace(shared.parse([]), **values, rest_port=http_port, patch=False), timeout_s)
