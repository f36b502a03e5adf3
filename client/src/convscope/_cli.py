"""The command line.

    convscope predict cat.png dog.jpg --model cifar --layers conv1,conv2 --save maps
    convscope explain cat.png --model cifar --method occlusion --save why
    convscope card cifar --url grpc://localhost:7070
    convscope ready cifar

Other packages add sub-commands, see `convscope.commands`; convscope-lens adds `report`, `ui`, `probe`, `filters` and
`strongest`.

Exit status: 0 for success, 1 if anything failed, 2 if the arguments are wrong. The API key is read from the environment
variable CONVSCOPE_API_KEY, never from the command line, which other users of the machine can see.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from convscope import __version__
from convscope._exceptions import ConvscopeError
from convscope.commands import METHODS, SubParsers, add_request_id, format_json, model, names, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from convscope._client import Client

API_KEY_VARIABLE = "CONVSCOPE_API_KEY"
OWN_COMMANDS = ("predict", "explain", "card", "ready")
LENS_COMMANDS = ("report", "ui", "probe", "filters", "strongest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # The reader has gone, as `head` does: the rest of the output is dropped silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    added = [] if command in OWN_COMMANDS else _added_commands()
    if command in LENS_COMMANDS and command not in [point.name for point in added]:
        print(
            f"convscope: {command} is a command of the package convscope-lens, which is not installed:"
            " run `pip install ./lens` in convscope's repository",
            file=sys.stderr,
        )
        return 2
    parser = build_parser(added)
    options = parser.parse_args(arguments)
    try:
        from convscope._client import Client  # Imported late: --help must not wait for numpy.

        try:
            client = Client(
                options.url,
                api_key=os.environ.get(API_KEY_VARIABLE) or None,
                deadline_s=options.deadline_s,
                ca_file=options.ca_file,
                retries=options.retries,
            )
        except ValueError as error:
            parser.error(str(error))
        with client:
            status: int = options.run(client, options)
            return status
    except BrokenPipeError:
        raise
    except (ConvscopeError, OSError, ValueError) as error:
        code = f"{error.code}: " if isinstance(error, ConvscopeError) else ""
        print(f"convscope: {code}{_one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _added_commands() -> list[EntryPoint]:
    """Find the sub-commands of other packages."""
    from importlib.metadata import entry_points  # Imported late: predict and the like must not wait for it.

    points = entry_points(group="convscope.commands")
    return sorted((point for point in points if point.name not in OWN_COMMANDS), key=lambda point: point.name)


def build_parser(added: Iterable[EntryPoint]) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        added: The sub-commands of other packages. One that cannot be loaded is left out, with a line on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="convscope",
        description="Class scores and feature maps of a served CNN.",
        epilog=f"The API key, if the server wants one, is read from {API_KEY_VARIABLE}.",
    )
    parser.add_argument("--version", action="version", version=f"convscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = [_add_predict(commands), _add_explain(commands), _add_card(commands), _add_ready(commands)]
    for command in parsers:
        add_request_id(command)
    for point in added:
        try:
            parsers.append(point.load()(commands))
        except Exception as error:  # A broken package must not break the commands of the others.
            print(f"convscope: the command {point.name} cannot be loaded: {_one_line(str(error))}", file=sys.stderr)
    for command in parsers:
        _add_common_options(command)
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", type=model, help="version of the model (default: the server's default)")
    parser.add_argument(
        "--url", default="http://localhost:8080", help="http(s):// or grpc(s)://host:port (default %(default)s)"
    )
    parser.add_argument("--ca-file", metavar="FILE", help="PEM file of the certificates to trust")
    parser.add_argument("--deadline-s", default=30.0, type=float, metavar="S", help="seconds a request may take (30)")
    parser.add_argument("--retries", default=3, type=int, metavar="N", help="how often a request is sent again (3)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_predict(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("predict", help="class scores and feature maps of pictures")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--layers", default=[], type=names, metavar="A,B|all", help="layers whose maps to return")
    parser.add_argument("--top-k", default=5, type=int, metavar="K", help="classes to show, 0 for all (default 5)")
    parser.add_argument(
        "--map-dtype",
        default="float32",
        choices=("float32", "float16", "uint8"),
        help="how maps are sent (default %(default)s)",
    )
    parser.add_argument("--pool", type=int, metavar="P", help="average maps down to P x P cells")
    parser.add_argument(
        "--channels", type=channels, metavar="N|A,B", help="the N strongest channels, or these (for one alone: 'A,')"
    )
    parser.add_argument("--timing", action="store_true", help="show where the time went")
    parser.add_argument("--save", metavar="DIR", help="write scores and maps of each picture to DIR/<its name>")
    parser.set_defaults(run=_predict)
    return parser


def _add_explain(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("explain", help="which part of a picture decides a score")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--method", default="grad_cam", choices=METHODS, help="how to explain (default %(default)s)")
    parser.add_argument("--layer", help="grad_cam, cam: whose map is used (default: the last layer of several cells)")
    parser.add_argument("--target", type=int, metavar="K", help="index of the class (default: the most probable)")
    parser.add_argument("--window", type=int, metavar="P", help="occlusion: side of the covered square in pixels")
    parser.add_argument("--step", type=int, metavar="P", help="occlusion: pixels from one square to the next")
    parser.add_argument("--steps", type=int, metavar="N", help="integrated_gradients: points (default 32)")
    parser.add_argument("--save", metavar="DIR", help="write heat and overlay of each picture to DIR/<its name>")
    parser.set_defaults(run=_explain)
    return parser


def _add_card(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("card", help="what a model is, takes and publishes")
    parser.add_argument("model", type=model)
    parser.set_defaults(run=_card)
    return parser


def _add_ready(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("ready", help="whether a model answers now")
    parser.add_argument("model", type=model)
    parser.set_defaults(run=_ready)
    return parser


def channels(text: str) -> int | list[int]:
    """Read `4`, the four strongest channels, or `0,3,5`, those."""
    return [int(number) for number in names(text)] if "," in text else int(text)


def _predict(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_pictures import predictions_json, predictions_text, process_pictures

    chosen = _chosen(options, "model version layers top_k map_dtype pool channels timing request_id")
    results = process_pictures(options.pictures, lambda files: client.predict(files, **chosen), save=options.save)
    print(format_json(predictions_json(results)) if options.json else predictions_text(results))
    return 1 if any(result.error is not None for result in results) else 0


def _explain(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_pictures import explanations_json, explanations_text, process_pictures

    chosen = _chosen(options, "model version method layer target window step steps request_id")
    results = process_pictures(options.pictures, lambda files: client.explain(files, **chosen), save=options.save)
    print(format_json(explanations_json(results)) if options.json else explanations_text(results))
    return 1 if any(result.error is not None for result in results) else 0


def _chosen(options: argparse.Namespace, which: str) -> dict[str, Any]:
    """Return the options that are arguments of the client's method."""
    return {name: getattr(options, name) for name in which.split()}


def _card(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_card import card_text

    card = client.model_card(options.model, options.version, request_id=options.request_id)
    print(format_json(dataclasses.asdict(card)) if options.json else card_text(card))
    return 0


def _ready(client: Client, options: argparse.Namespace) -> int:
    reason = None
    try:
        client.model_card(options.model, options.version, request_id=options.request_id)
    except ConvscopeError as error:
        reason = error
    if options.json:
        answer: dict[str, object] = {"model": options.model, "ready": reason is None, "error": None}
        if reason is not None:
            answer["error"] = {"code": reason.code, "message": reason.message, "request_id": reason.request_id}
        print(format_json(answer))
    elif reason is None:
        print(f"{options.model} is ready")
    else:
        print(f"convscope: {options.model} is not ready: {reason.code}: {_one_line(str(reason))}", file=sys.stderr)
    return 0 if reason is None else 1


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
