"""The command line of `python -m server`, and the settings that it is parsed to.

Priority: command line > default. The server reads three kinds of environment variables: `JAVA_HOME` (server.java),
`CUDA_VISIBLE_DEVICES` (server.devices) and numbers of threads (server.configuration); its children inherit the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1024 * 1024
LARGEST_MB = 2047  # TorchServe keeps message sizes in a signed 32-bit integer of bytes.


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return read


def _at_least(least: float) -> Callable[[str], float]:
    """Return a type for argparse: a duration in seconds."""

    def read(text: str) -> float:
        try:
            duration = float(text)
        except ValueError:
            duration = -1.0
        if not least <= duration <= 86400:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} to 86400")
        return duration

    return read


port = _whole(0, 65535)  # 0 for a free one.
seconds, _pause = _at_least(0), _at_least(0.1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server: its options, whose help texts describe them; None for an option that was not given.

    The second host has its HTTP port as `rest_port`. An option of the other host keeps its default.
    """

    model_store: Path
    watch_store: bool = False
    models: tuple[str, ...]
    host: str
    rest_port: int
    grpc_port: int
    metrics_port: int
    ready_port: int | None = None
    workers: int | None = None
    device: str
    startup_timeout_s: float
    warm_up_s: float
    drain_s: float
    unready_s: float
    watch_s: float
    max_request_mb: int
    max_reply_mb: int
    heap_mb: int
    work_dir: Path | None = None
    log_dir: Path | None = None
    engine: str
    precision: str
    scaled_decoding: bool = False
    patch: bool = True
    log_requests_s: float
    log_format: str
    require_signature: Path | None = None
    timeout_s: float = 60.0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line; `parse` turns its result into settings."""
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve every archive of the model store with TorchServe, over REST and gRPC, until Ctrl-C.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_shared(parser)
    add = parser.add_argument
    add("--rest-port", type=port, default=8080, metavar="PORT", help="REST; 0 takes a free port")
    add("--grpc-port", type=port, default=7070, metavar="PORT", help="gRPC; 0 takes a free port")
    add("--metrics-port", type=port, default=8082, metavar="PORT", help="Prometheus; 0 takes a free port")
    add(
        "--ready-port",
        type=port,
        default=argparse.SUPPRESS,
        metavar="PORT",
        help="/ready, for load balancers; 0 takes a free port (default: none)",
    )
    add("--warm-up-s", type=seconds, default=2.0, metavar="S", help="seconds of warm-up requests before it is ready")
    add(
        "--watch-s",
        type=_at_least(0.1),
        default=10.0,
        metavar="S",
        help="seconds between two checks that a model responds",
    )
    add(
        "--heap-mb",
        type=_whole(512, 1024 * 1024),
        default=1024,
        metavar="MB",
        help="largest heap of the Java front end",
    )
    add(
        "--log-dir",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="where the logs go and stay (default: the private directory; kept after a failure only)",
    )
    add(
        "--no-patches",
        dest="patch",
        action="store_false",
        default=argparse.SUPPRESS,
        help="run TorchServe unpatched: callers can then stop a worker or use up memory, and requests wait for others",
    )
    return parser


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the options that both hosts have: this one and `server.kserve`."""
    add = parser.add_argument
    add("--model-store", type=Path, default=Path("model_store"), metavar="DIR", help="folder with the .mar archives")
    add(
        "--models",
        type=_names,
        default="",
        metavar="A,B",
        help="models to serve, name or name/version (default: all)",
    )
    add(
        "--watch-store",
        action="store_true",
        default=argparse.SUPPRESS,
        help="load archives that appear or change in the folder while it serves, as `python -m server.reload` does",
    )
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address that REST, gRPC and metrics listen on")
    add(
        "--workers",
        type=_whole(1, 1024),
        default=argparse.SUPPRESS,
        metavar="N",
        help="worker processes per model (default: the archive's number, else one per GPU, else one per core, at most "
        "four, shared among the models)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the networks run")
    add("--startup-timeout-s", type=seconds, default=300.0, metavar="S", help="seconds until all models must respond")
    add("--drain-s", type=seconds, default=10.0, metavar="S", help="seconds for requests in flight when it stops")
    add(
        "--unready-s",
        type=seconds,
        default=0.0,
        metavar="S",
        help="seconds for which it goes on serving after a signal to stop, while readiness already fails",
    )
    add("--max-request-mb", type=_whole(1, LARGEST_MB), default=64, metavar="MB", help="largest request")
    add("--max-reply-mb", type=_whole(1, LARGEST_MB), default=256, metavar="MB", help="largest reply")
    add(
        "--work-dir",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder for the private directory of the run (default: the system's temporary folder)",
    )
    add(
        "--engine",
        choices=("auto", "torch", "onnxruntime", "openvino"),
        default="auto",
        help="engine of the networks; auto: for each archive the fastest that works",
    )
    add(
        "--precision",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="precision of the networks; float16 on a GPU only, bfloat16 also on processors that have it",
    )
    add(
        "--scaled-decoding",
        action="store_true",
        default=argparse.SUPPRESS,
        help="decode large JPEGs to 1/2, 1/4 or 1/8 of their size before resizing: up to three times as fast; "
        "values differ by less than one level of 255 on average, by up to 23 at sharp edges",
    )
    add(
        "--log-requests-s",
        type=seconds,
        default=0.0,
        metavar="S",
        help="log at most one successful request per worker in S seconds; 0: only requests that fail",
    )
    add("--log-format", choices=("text", "json"), default="text", help="format of standard error")
    add(
        "--require-signature",
        type=_file,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="serve only archives that one of these Ed25519 keys signed with ssh-keygen, one public key per line; "
        "empty: unsigned ones too (default)",
    )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Parse the command line into settings.

    Args:
        arguments: The command line without the program; None for the process's own.

    Raises:
        SystemExit: The command line is wrong (status 2) or asks for help (status 0).
    """
    parser = build_parser()
    given = parser.parse_args(arguments)
    named = (given.rest_port, given.grpc_port, given.metrics_port, getattr(given, "ready_port", None))
    ports = list(filter(None, named))
    if len(set(ports)) < len(ports):
        parser.error("--rest-port, --grpc-port, --metrics-port and --ready-port must differ")
    return Settings(**vars(given))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _file(text: str) -> Path | None:
    return Path(text) if text else None  # Empty is the default of the deployment's variable.
