"""The command `convscope`.

    convscope predict cat.png dog.jpg --model cifar --layers conv1,conv2 --save maps
    convscope explain cat.png --model cifar --method occlusion --save explanations
    convscope card cifar --url grpc://localhost:7070
    convscope ready cifar

Other packages can add sub-commands, see `convscope.commands`; those of convscope-lens are `LENS_COMMANDS`.

Exit status: 0 success; 1 something failed; 2 invalid arguments; 130 interrupted with Ctrl-C. The API key is read from
the environment variable CONVSCOPE_API_KEY, never from the command line, which other users of the machine can see.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from convscope._exceptions import ConvscopeError
from convscope._options import MapDtype
from convscope._version import __version__
from convscope.commands import (
    METHODS,
    SubParsers,
    add_request_id,
    format_json,
    parse_model_name,
    parse_names,
    parse_version,
    printable,
)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from convscope._client import Client

API_KEY_VARIABLE = "CONVSCOPE_API_KEY"
BUILTIN_COMMANDS = ("predict", "explain", "card", "ready")
LENS_COMMANDS = ("report", "ui", "probe", "filters", "strongest", "ablate", "patch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `convscope`.

    Args:
        arguments: Arguments without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # The pipe's reader closed early, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    plugins = [] if command in BUILTIN_COMMANDS else _plugin_commands()
    if command in LENS_COMMANDS and command not in [point.name for point in plugins]:
        print(
            f"convscope: {command} is a command of the package convscope-lens, which is not installed:"
            " run `pip install ./lens` in convscope's repository",
            file=sys.stderr,
        )
        return 2
    parser = build_parser(plugins)
    options = parser.parse_args(arguments)
    try:
        from convscope._client import Client  # Imported here to keep --help fast.

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


def _plugin_commands() -> list[EntryPoint]:
    """Return the sub-commands of other packages."""
    from importlib.metadata import entry_points  # Imported here to keep the built-in commands fast.

    points = entry_points(group="convscope.commands")
    return sorted((point for point in points if point.name not in BUILTIN_COMMANDS), key=lambda point: point.name)


def build_parser(plugins: Iterable[EntryPoint]) -> argparse.ArgumentParser:
    """Create the argument parser.

    Args:
        plugins: Sub-commands of other packages. One that cannot be loaded is omitted, with a line on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="convscope",
        description="Class scores and feature maps of a served image network.",
        epilog=f"The API key, if the server requires one, is read from {API_KEY_VARIABLE}.",
    )
    parser.add_argument("--version", action="version", version=f"convscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = [_add_predict(commands), _add_explain(commands), _add_card(commands), _add_ready(commands)]
    for command in parsers:
        add_request_id(command)
    for point in plugins:
        try:
            parsers.append(point.load()(commands))
        except Exception as error:  # A broken package must not break the other commands.
            print(f"convscope: the command {point.name} cannot be loaded: {_one_line(str(error))}", file=sys.stderr)
    for command in parsers:
        _add_common_options(command)
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", type=parse_version, help="version of the model (default: the server's default)")
    parser.add_argument(
        "--url", default="http://localhost:8080", help="http(s):// or grpc(s)://host:port (default %(default)s)"
    )
    parser.add_argument("--ca-file", metavar="FILE", help="PEM file of CA certificates to trust")
    parser.add_argument(
        "--deadline-s",
        default=30.0,
        type=float,
        metavar="S",
        help="deadline per request in seconds (default %(default)s)",
    )
    parser.add_argument("--retries", default=3, type=int, metavar="N", help="maximum retries (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_predict(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("predict", help="class scores and feature maps of pictures")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    parser.add_argument("--model", required=True, type=parse_model_name)
    parser.add_argument("--layers", default=[], type=parse_names, metavar="A,B|all", help="layers whose maps to return")
    parser.add_argument(
        "--top-k", default=5, type=int, metavar="K", help="scores to show, 0 for all (default %(default)s)"
    )
    parser.add_argument(
        "--map-dtype",
        default="float32",
        choices=get_args(MapDtype),
        help="dtype of maps on the wire (default %(default)s)",
    )
    parser.add_argument("--pool", type=int, metavar="P", help="average maps down to P x P cells")
    parser.add_argument(
        "--channels",
        type=parse_channels,
        metavar="N|A,B",
        help="N strongest channels, or a list (a single one: '3,')",
    )
    parser.add_argument("--timing", action="store_true", help="print timing by stage")
    parser.add_argument("--save", metavar="DIR", help="write scores and maps of each picture to DIR/<picture name>")
    parser.set_defaults(run=_predict)
    return parser


def _add_explain(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain", help="heat map of what contributes to a class score"
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    parser.add_argument("--model", required=True, type=parse_model_name)
    parser.add_argument("--method", default="grad_cam", choices=METHODS, help="method (default %(default)s)")
    parser.add_argument(
        "--layer",
        help="layer to use (grad_cam, cam; default: the last one with more than one row and column; in a transformer, "
        "the last such one that the scores depend on)",
    )
    parser.add_argument(
        "--target", type=int, metavar="K", help="index of the class (default: the most probable, or the first number)"
    )
    parser.add_argument("--window", type=int, metavar="P", help="occlusion: side of the covered square in pixels")
    parser.add_argument("--step", type=int, metavar="P", help="occlusion: distance between squares in pixels")
    parser.add_argument("--steps", type=int, metavar="N", help="integrated_gradients: number of points (default 32)")
    parser.add_argument("--save", metavar="DIR", help="write heat and overlay of each picture to DIR/<picture name>")
    parser.set_defaults(run=_explain)
    return parser


def _add_card(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "card", help="show the model card: input, classes, layers, limits"
    )
    parser.add_argument("model", type=parse_model_name)
    parser.set_defaults(run=_card)
    return parser


def _add_ready(commands: SubParsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("ready", help="check whether a model is ready")
    parser.add_argument("model", type=parse_model_name)
    parser.set_defaults(run=_ready)
    return parser


def parse_channels(text: str) -> int | list[int]:
    """Type for argparse: `4`, the four strongest channels, or `0,3,5`, channel indexes."""
    return [int(item) for item in parse_names(text)] if "," in text else int(text)


def _predict(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_results import format_predictions, predictions_json, process_pictures

    selected = _select_options(options, "model version layers top_k map_dtype pool channels timing request_id")

    def pictures_per_request() -> int:
        card = client.model_card(options.model, options.version)
        names = {layer.name for layer in card.layers} if "all" in options.layers else set(options.layers)
        reply_bytes = sum(layer.bytes.get(options.map_dtype, 0) for layer in card.layers if layer.name in names)
        return card.pictures_per_request(reply_bytes)

    results = process_pictures(
        options.pictures,
        lambda files: client.predict(files, **selected),
        pictures_per_request=pictures_per_request,
        request_id=options.request_id,
        save=options.save,
    )
    print(format_json(predictions_json(results)) if options.json else format_predictions(results))
    return 1 if any(result.error is not None for result in results) else 0


def _explain(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_results import explanations_json, format_explanations, process_pictures

    selected = _select_options(options, "model version method layer target window step steps request_id")

    def pictures_per_request() -> int:
        card = client.model_card(options.model, options.version)
        size = card.input.channels * (card.input.height or 0) * (card.input.width or 0)
        return card.pictures_per_request(2 * 4 * size or 1)  # float32 heat and picture, both of this size at most.

    results = process_pictures(
        options.pictures,
        lambda files: client.explain(files, **selected),
        pictures_per_request=pictures_per_request,
        request_id=options.request_id,
        save=options.save,
    )
    print(format_json(explanations_json(results)) if options.json else format_explanations(results))
    return 1 if any(result.error is not None for result in results) else 0


def _select_options(options: argparse.Namespace, names: str) -> dict[str, Any]:
    """Return the options that are arguments of the client's method."""
    return {name: getattr(options, name) for name in names.split()}


def _card(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_results import format_card

    card = client.model_card(options.model, options.version, request_id=options.request_id)
    print(format_json(dataclasses.asdict(card)) if options.json else format_card(card))
    return 0


def _ready(client: Client, options: argparse.Namespace) -> int:
    error = None
    try:
        client.model_card(options.model, options.version, request_id=options.request_id)
    except ConvscopeError as raised:
        error = raised
    if options.json:
        result: dict[str, object] = {"model": options.model, "ready": error is None, "error": None}
        if error is not None:
            result["error"] = {"code": error.code, "message": error.message, "request_id": error.request_id}
        print(format_json(result))
    elif error is None:
        print(f"{options.model} is ready")
    else:
        print(f"convscope: {options.model} is not ready: {error.code}: {_one_line(str(error))}", file=sys.stderr)
    return 0 if error is None else 1


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
