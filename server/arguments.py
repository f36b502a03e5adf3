"""The command line of `python -m server`, and the settings that it is parsed to.

Priority: command line > default. The server reads three kinds of environment variables: `JAVA_HOME` (server.java),
`CUDA_VISIBLE_DEVICES` (server.devices) and numbers of threads (server.configuration); its children inherit the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1024 * 1024
LARGEST_MB = 2047  # TorchServe keeps message sizes in a signed 32-bit integer of bytes.


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server.

    Attributes:
        model_store: Folder that holds the archives.
        watch_store: Whether to load archives that appear or change in the folder while the server runs.
        models: Models to serve, `name` or `name/version`; empty for every archive.
        host: Address that REST, gRPC and metrics listen on.
        rest_port: Port of the REST API; 0 takes a free one.
        grpc_port: Port of the gRPC API; 0 takes a free one.
        metrics_port: Port of `/metrics`; 0 takes a free one.
        ready_port: Port of `/ready`; None for none.
        workers: Worker processes per model; None leaves it to the archive.
        device: `auto`, `cpu` or `cuda`.
        startup_timeout_s: Seconds until every model must have answered.
        warm_up_s: Seconds for which the server sends itself requests before it is ready; 0 for none.
        drain_s: Seconds that requests in flight get after a signal to stop.
        watch_s: Seconds from a model card to the launcher's next request for it.
        unready_s: Seconds for which the server goes on serving while readiness already fails.
        max_request_mb: Largest request, in MiB.
        max_reply_mb: Largest reply, in MiB.
        heap_mb: Largest heap of the Java front end, in MiB.
        work_dir: Folder in which the server makes its private directory; None for the system's temporary folder.
        log_dir: Folder for the logs; None keeps them in the private directory.
        engine: Engine of the networks: `auto`, `torch`, `onnxruntime` or `openvino`.
        precision: Precision of the networks: `float32`, `float16` or `bfloat16`.
        scaled_decoding: Whether to decode large JPEGs to a part of their size.
        patch: Whether to patch TorchServe; see `patches`.
        log_requests_s: Seconds from one successful request that a worker logs to the next; 0 logs none.
        log_format: `text` for people or `json` for log collectors, on standard error.
        require_signature: File of the public keys of which one must have signed an archive; None for unsigned ones too.
    """

    model_store: Path
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
    watch_store: bool = False


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
    add("--watch-s", type=_pause, default=10.0, metavar="S", help="seconds between two checks that a model responds")
    add("--heap-mb", type=_heap, default=1024, metavar="MB", help="largest heap of the Java front end")
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
        type=_count,
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
    add("--max-request-mb", type=_megabytes, default=64, metavar="MB", help="largest request")
    add("--max-reply-mb", type=_megabytes, default=256, metavar="MB", help="largest reply")
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


def _integer(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def port(text: str) -> int:
    """Type for argparse: a port; 0 for a free one."""
    return _integer(text, 0, 65535)


def _count(text: str) -> int:
    return _integer(text, 1, 1024)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _file(text: str) -> Path | None:
    return Path(text) if text else None  # Empty is the default of the deployment's variable.


def _megabytes(text: str) -> int:
    return _integer(text, 1, LARGEST_MB)


def _heap(text: str) -> int:
    return _integer(text, 512, 1024 * 1024)


def _pause(text: str) -> float:
    duration = seconds(text)
    if duration < 0.1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return duration


def seconds(text: str) -> float:
    """Type for argparse: a duration in seconds."""
    try:
        duration = float(text)
    except ValueError:
        duration = -1.0
    if not 0 <= duration <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return duration
