"""The command `convscope`.

    convscope models
    convscope predict cat.png pictures/ --model cifar --layers conv1,conv2 --save maps
    convscope explain cat.png --model cifar --method occlusion --target cat --save explanations
    convscope card cifar --url grpc://localhost:7070
    convscope ready cifar

Other packages can add sub-commands, see `convscope.commands`; those of convscope-lens are `LENS_COMMANDS`.

Exit status: 0 success; 1 something failed; 2 invalid arguments; 130 interrupted with Ctrl-C. The URL is read from the
environment variable CONVSCOPE_URL unless `--url` gives it. The API key is read from CONVSCOPE_API_KEY, never from the
command line, which other users of the machine can see.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from convscope._exceptions import ConvscopeError
from convscope._options import MAX_DEADLINE_S, MapDtype
from convscope._version import __version__
from convscope.commands import (
    METHOD_HELP,
    METHODS,
    MODEL_HELP,
    PICTURE_HELP,
    SubParsers,
    UsageError,
    add_request_id,
    at_least,
    find_target,
    format_json,
    parse_model_name,
    parse_names,
    parse_version,
    printable,
    reject_unused,
)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from convscope._cli_results import PictureResult, ResultFolders
    from convscope._client import Client

URL_VARIABLE = "CONVSCOPE_URL"
DEFAULT_URL = "http://localhost:8080"
API_KEY_VARIABLE = "CONVSCOPE_API_KEY"
BUILTIN_COMMANDS = ("models", "predict", "explain", "card", "ready")
LENS_COMMANDS = ("report", "ui", "probe", "filters", "strongest", "survey", "export", "ablate", "patch")
_ASCII = {"×": "x", "–": "-", "°": "deg"}  # Instead of what a terminal cannot show; of anything else `?`.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `convscope`.

    Args:
        arguments: Arguments without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    if sys.stdout is None:
        return _complain("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("convscope", _replace)
        sys.stdout.reconfigure(errors="convscope")
    status = 0
    try:
        try:
            status = _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:  # Of standard output: the pipe's reader closed early, as `head` does, or the disk is full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if status or isinstance(error, BrokenPipeError) else _complain(f"standard output: {error}")
    return status


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Handle text that the terminal's encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)  # noqa: S101  # For the types.
    return "".join(_ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    plugins = [] if command in BUILTIN_COMMANDS else _plugin_commands()
    as_json = "--json" in arguments
    if command in LENS_COMMANDS and command not in [point.name for point in plugins]:
        return _fail(
            f"{command} is a command of the package convscope-lens, which is not installed: run `pip install ./lens` in"
            " convscope's repository",
            "usage",
            as_json=as_json,
            status=2,
        )
    parser = build_parser(plugins)
    _Parser.as_json = as_json
    options = parser.parse_args(arguments)
    as_json = bool(options.json)
    command_parser: argparse.ArgumentParser = options.parser
    try:
        from convscope._client import Client  # Imported here to keep --help fast.

        url = options.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        try:
            client = Client(
                url,
                api_key=os.environ.get(API_KEY_VARIABLE) or None,
                deadline_s=options.deadline_s,
                ca_file=options.ca_file,
                retries=options.retries,
            )
        except ValueError as error:  # Its message begins with the name of the argument.
            typed = {
                "url": "--url" if options.url else URL_VARIABLE,
                "ca_file": "--ca-file",
                "api_key": API_KEY_VARIABLE,
            }
            name, _, rest = str(error).partition(" ")
            raise UsageError(f"{typed.get(name, name)} {rest}") from error
        with client:
            status: int = options.run(client, options)
            return status
    except UsageError as error:
        command_parser.error(printable(str(error)))
    except BrokenPipeError:
        raise
    except ConvscopeError as error:
        if not as_json:
            return _complain(_with_notes(f"{error.code}: {error}", error))
        print(format_json({"error": _error_values(error)}))
        return 1
    except (OSError, ValueError) as error:
        code = "os_error" if isinstance(error, OSError) else "invalid_value"
        return _fail(str(error), code, as_json=as_json)


def _fail(message: str, code: str, *, as_json: bool, status: int = 1) -> int:
    """Say why the command failed, as JSON on standard output or in a line on standard error; return the exit status."""
    if as_json:
        print(format_json({"error": {"code": code, "message": message, "request_id": None}}))
        return status
    return _complain(message, status)


def _with_notes(said: str, error: ConvscopeError) -> str:
    return "; ".join([said, *getattr(error, "__notes__", [])])  # Commands note how far they came.


def _error_values(error: ConvscopeError) -> dict[str, str | None]:
    return {"code": error.code, "message": _with_notes(error.message, error), "request_id": error.request_id}


def _complain(text: str, status: int = 1) -> int:
    print(f"convscope: {printable(' '.join(text.split()))}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser that prints its errors as JSON if asked for."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        if not _Parser.as_json:
            super().error(message)
        _fail(message, "usage", as_json=True)
        self.exit(2)


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
    parser: argparse.ArgumentParser = _Parser(
        prog="convscope",
        description="Class scores and feature maps of a served image network.",
        epilog=f"The API key, if the server requires one, is read from {API_KEY_VARIABLE}.",
    )
    parser.add_argument("--version", action="version", version=f"convscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = (_add_models, _add_predict, _add_explain, _add_card, _add_ready)
    parsers = [add_command(commands) for add_command in add]
    for command in parsers[1:]:
        add_request_id(command)
    for point in plugins:
        try:
            parsers.append(point.load()(commands))
        except Exception as error:  # A broken package must not break the other commands.
            _complain(f"the command {point.name} cannot be loaded: {error}")
    for command in parsers:
        _add_common_options(command)
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", type=parse_version, help="version of the model (default: the server's default)")
    parser.add_argument(
        "--url", help=f"http(s):// or grpc(s)://host:port (default: {URL_VARIABLE}, else {DEFAULT_URL})"
    )
    parser.add_argument("--ca-file", metavar="FILE", help="PEM file of CA certificates to trust")
    parser.add_argument(
        "--deadline-s",
        default=30.0,
        type=_parse_deadline,
        metavar="S",
        help="deadline per request in seconds (default %(default)s)",
    )
    parser.add_argument(
        "--retries", default=3, type=at_least(0), metavar="N", help="maximum retries (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, errors too")


def _parse_deadline(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_DEADLINE_S:
        raise argparse.ArgumentTypeError(f"must be seconds above 0 and at most {MAX_DEADLINE_S}, not {text!r}")
    return seconds


def _add_models(commands: SubParsers) -> argparse.ArgumentParser:
    parser = commands.add_parser("models", help="list the models of the server")
    parser.set_defaults(run=_models)
    return parser


def _add_pictures(parser: argparse.ArgumentParser, saved: str) -> None:
    """Add the arguments of the commands that send pictures."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=PICTURE_HELP)
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument("--save", metavar="DIR", help=f"write {saved} of each picture to DIR/<picture name>")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="do not send pictures whose result is in DIR")
    existing.add_argument("--overwrite", action="store_true", help="replace the results in DIR")


def _add_predict(commands: SubParsers) -> argparse.ArgumentParser:
    parser = commands.add_parser("predict", help="class scores and feature maps of pictures")
    _add_pictures(parser, "scores and maps")
    parser.add_argument("--layers", type=parse_names, metavar="A,B|all", help="layers whose maps to return")
    parser.add_argument(
        "--top-k", default=5, type=at_least(0), metavar="K", help="scores to show, 0 for all (default %(default)s)"
    )
    parser.add_argument("--map-dtype", choices=get_args(MapDtype), help="dtype of maps on the wire (default: float32)")
    parser.add_argument("--pool", type=at_least(1), metavar="P", help="average maps down to P x P cells")
    parser.add_argument(
        "--channels",
        type=parse_channels,
        metavar="N|A,B",
        help="N strongest channels, or a list (a single one: '3,')",
    )
    parser.add_argument(
        "--edits",
        type=parse_edits,
        metavar="JSON|@FILE",
        help="operations on maps while the network runs: "
        """'[{"layer": "conv1", "operation": "zero", "channels": [3]}]'""",
    )
    parser.add_argument("--compare", action="store_true", help="also show what the edits changed")
    parser.add_argument("--timing", action="store_true", help="print timing by stage")
    parser.set_defaults(run=_predict)
    return parser


def _add_explain(commands: SubParsers) -> argparse.ArgumentParser:
    parser = commands.add_parser("explain", help="heat map of what contributes to a class score")
    _add_pictures(parser, "heat and overlay")
    parser.add_argument("--method", default="grad_cam", choices=METHODS, help=METHOD_HELP)
    parser.add_argument(
        "--layer",
        help="layer to use (grad_cam, cam; default: the last one with more than one row and column; in a transformer, "
        "the last such one that the scores depend on)",
    )
    parser.add_argument(
        "--target",
        metavar="CLASS",
        help="label or index of the class (default: the most probable, or the first number)",
    )
    parser.add_argument(
        "--window", type=at_least(1), metavar="P", help="occlusion: side of the covered square in pixels"
    )
    parser.add_argument("--step", type=at_least(1), metavar="P", help="occlusion: distance between squares in pixels")
    parser.add_argument(
        "--steps", type=at_least(1), metavar="N", help="integrated_gradients: number of points (default 32)"
    )
    parser.set_defaults(run=_explain)
    return parser


def _add_card(commands: SubParsers) -> argparse.ArgumentParser:
    parser = commands.add_parser("card", help="show the model card: input, classes, layers, limits")
    parser.add_argument("model", type=parse_model_name, help=MODEL_HELP)
    parser.set_defaults(run=_card)
    return parser


def _add_ready(commands: SubParsers) -> argparse.ArgumentParser:
    parser = commands.add_parser("ready", help="check whether a model is ready")
    parser.add_argument("model", type=parse_model_name, help=MODEL_HELP)
    parser.set_defaults(run=_ready)
    return parser


def parse_channels(text: str) -> int | list[int]:
    """Type for argparse: `4`, the four strongest channels, or `0,3,5`, channel indexes."""
    return [at_least(0)(item) for item in parse_names(text)] if "," in text else at_least(1)(text)


def parse_edits(text: str) -> list[dict[str, Any]]:
    """Type for argparse: a JSON list of edits, or `@` and a file with one. The service checks layers and cells."""
    from convscope._request import build_options  # Imported here to keep --help fast.

    where = f"{text[1:]}: " if text.startswith("@") else ""
    try:
        edits = json.loads(Path(text[1:]).read_bytes() if where else text)
        if not isinstance(edits, list) or not edits:
            raise ValueError("must be a list of at least one operation")
        build_options(edits=edits)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{where}{error.strerror}") from error
    except RecursionError as error:
        raise argparse.ArgumentTypeError(f"{where}the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{where}not JSON: {error}") from error
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{where}{error}") from error
    if any(edit.get("picture") is not None or edit["operation"] == "patch" for edit in edits):
        raise argparse.ArgumentTypeError(
            f"{where}the command decides which pictures share a request, so an edit cannot name a picture of one"
            " (picture, patch); use the client's predict()"
        )
    return list(edits)


def _models(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_results import format_models, models_json

    reject_unused(options, ["version"], "for all models")
    cards: list[tuple[Any, Any]] = []
    for model in client.models():
        try:
            cards.append((model, client.model_card(*model)))
        except ConvscopeError as error:
            cards.append((model, error))
    print(format_json(models_json(cards)) if options.json else format_models(cards))
    return 0


def _predict(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_results import format_predictions, predictions_json, process_pictures

    if options.layers is None:
        reject_unused(options, ["map_dtype", "pool", "channels"], "without --layers")
    if options.edits is None:
        reject_unused(options, ["compare"], "without --edits")
    options.layers, options.map_dtype = options.layers or [], options.map_dtype or "float32"
    options.edits = options.edits or []
    selected = _select_options(
        options, "model version layers top_k map_dtype pool channels edits compare timing request_id"
    )

    def pictures_per_request() -> int:
        card = client.model_card(options.model, options.version)
        reply_bytes = sum(layer.bytes.get(options.map_dtype, 0) for layer in card.select_layers(options.layers))
        return card.pictures_per_request(reply_bytes * (2 if options.compare else 1))

    results, failure = process_pictures(
        options.pictures,
        lambda files: client.predict(files, **selected),
        pictures_per_request=pictures_per_request,
        request_id=options.request_id,
        folders=_result_folders(options),
        fetch_card=lambda: client.model_card(options.model, options.version),
    )
    return _show(results, failure, options, predictions_json, format_predictions)


def _explain(client: Client, options: argparse.Namespace) -> int:
    from convscope._cli_results import explanations_json, format_explanations, process_pictures

    if options.method not in ("grad_cam", "cam"):
        reject_unused(options, ["layer"], f"with --method {options.method}")
    if options.method != "occlusion":
        reject_unused(options, ["window", "step"], f"with --method {options.method}")
    if options.method != "integrated_gradients":
        reject_unused(options, ["steps"], f"with --method {options.method}")
    folders = _result_folders(options)
    options.target = find_target(client, options)
    selected = _select_options(options, "model version method layer target window step steps request_id")

    def pictures_per_request() -> int:
        card = client.model_card(options.model, options.version)
        size = card.input.channels * (card.input.height or 0) * (card.input.width or 0)
        return card.pictures_per_request(2 * 4 * size or 1)  # float32 heat and picture, both of this size at most.

    results, failure = process_pictures(
        options.pictures,
        lambda files: client.explain(files, **selected),
        pictures_per_request=pictures_per_request,
        request_id=options.request_id,
        folders=folders,
        fetch_card=lambda: client.model_card(options.model, options.version),
    )
    return _show(results, failure, options, explanations_json, format_explanations)


def _show(
    results: list[PictureResult[Any]],
    failure: ConvscopeError | None,
    options: argparse.Namespace,
    as_values: Callable[[list[PictureResult[Any]]], dict[str, Any]],
    as_text: Callable[[list[PictureResult[Any]]], str],
) -> int:
    """Print the results of pictures, and then the error of the service if it ended the command; return the status."""
    if options.json:
        error = {} if failure is None else {"error": _error_values(failure)}
        print(format_json(as_values(results) | error))
    else:
        print(as_text(results))
        if failure is not None:
            raise failure
    return 1 if failure is not None or any(result.error is not None for result in results) else 0


def _result_folders(options: argparse.Namespace) -> ResultFolders | None:
    """Return where to save results; None without `--save`."""
    from convscope._cli_results import ResultFolders

    if options.save is None:
        reject_unused(options, ["skip_existing", "overwrite"], "without --save")
        return None
    existing = "skip" if options.skip_existing else "overwrite" if options.overwrite else "error"
    made_of = {"model": options.model, "method": getattr(options, "method", None)}
    return ResultFolders(Path(options.save), existing, made_of)


def _select_options(options: argparse.Namespace, names: str) -> dict[str, Any]:
    """Return the options that are arguments of the client's method."""
    return {name: getattr(options, name) for name in names.split()}


def _card(client: Client, options: argparse.Namespace) -> int:
    from convscope._card import format_card

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
        _complain(f"{options.model} is not ready: {error.code}: {error}")
    return 0 if error is None else 1
