"""The command line: `convscope predict|explain|strongest|card|ready`, and what other packages add to it.

    convscope predict cat.png dog.jpg --model cifar --layers conv1,conv2 --save maps
    convscope explain cat.png --model cifar --method occlusion --save why
    convscope strongest samples/*.png --model cifar --layer conv2 --channel 3 --save patches
    convscope card cifar --url grpc://localhost:7070
    convscope ready cifar

Exit status: 0 if all went well, 1 if anything failed, 2 if the command was not understood. The API key is read from
the environment variable CONVSCOPE_API_KEY, never from the command line, where other users of the machine could see it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from convscope import __version__
from convscope._cli_common import METHODS, as_json, channels, name, names, request_id
from convscope._exceptions import ConvscopeError
from convscope._table import printable

if TYPE_CHECKING:
    from convscope._client import Client

API_KEY_VARIABLE = "CONVSCOPE_API_KEY"
GROUP = "convscope.commands"  # Of the entry points with which other packages add commands.
LENS = ("report", "ui", "probe", "filters")  # The commands of the package convscope-lens.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # Who was reading has gone, as `head` does: the rest goes nowhere, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    """Do what the arguments ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in LENS and not entry_points(group=GROUP, name=arguments[0]):
        print(
            f"convscope: {arguments[0]} is a command of the package convscope-lens, which is not installed:"
            " pip install ./lens in convscope's repository",
            file=sys.stderr,
        )
        return 2
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        from convscope._client import Client  # Here, so that --help need not wait for numpy.

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


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="convscope",
        description="Class scores and feature maps of a served CNN.",
        epilog=f"The API key, if the server wants one, is read from {API_KEY_VARIABLE}.",
    )
    parser.add_argument("--version", action="version", version=f"convscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="what a model sees in pictures")
    predict.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    predict.add_argument("--model", required=True, type=name)
    predict.add_argument("--layers", default=[], type=names, metavar="A,B|all", help="layers whose maps to return")
    predict.add_argument("--top-k", default=5, type=int, metavar="K", help="classes to show, 0 for all (default 5)")
    predict.add_argument(
        "--map-dtype", default="float32", choices=("float32", "float16", "uint8"), help="what maps travel as"
    )
    predict.add_argument("--pool", type=int, metavar="P", help="average maps down to P x P cells")
    predict.add_argument(
        "--channels", type=channels, metavar="N|A,B", help="the N strongest channels, or these (for one alone: 'A,')"
    )
    predict.add_argument("--timing", action="store_true", help="show where the time went")
    predict.add_argument("--save", metavar="DIR", help="write scores and maps of each picture to DIR/<its name>")
    predict.set_defaults(run=_predict)

    explain = commands.add_parser("explain", help="which part of a picture a class's score rests on")
    explain.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    explain.add_argument("--model", required=True, type=name)
    explain.add_argument("--method", default="grad_cam", choices=METHODS, help="how to find out (default %(default)s)")
    explain.add_argument("--layer", help="grad_cam, cam: whose map to look at (default: the last of several cells)")
    explain.add_argument("--target", type=int, metavar="K", help="index of the class (default: the most probable)")
    explain.add_argument("--window", type=int, metavar="P", help="occlusion: pixels of the square, each way")
    explain.add_argument("--step", type=int, metavar="P", help="occlusion: pixels from one square to the next")
    explain.add_argument("--steps", type=int, metavar="N", help="integrated_gradients: points (default 32)")
    explain.add_argument("--save", metavar="DIR", help="write heat and overlay of each picture to DIR/<its name>")
    explain.set_defaults(run=_explain)

    strongest = commands.add_parser("strongest", help="what a channel answers to most, in pictures")
    strongest.add_argument("pictures", nargs="+", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    strongest.add_argument("--model", required=True, type=name)
    strongest.add_argument("--layer", required=True, type=name)
    strongest.add_argument("--channel", required=True, type=int, metavar="C")
    strongest.add_argument("-n", default=9, type=int, help="how many cells (default %(default)s)")
    strongest.add_argument("--per-picture", default=1, type=int, metavar="N", help="at most so many of one picture (1)")
    strongest.add_argument("--save", metavar="DIR", help="write each patch as a PNG to a new directory")
    strongest.set_defaults(run=_strongest)

    card = commands.add_parser("card", help="what a model is, takes and publishes")
    card.add_argument("model", type=name)
    card.set_defaults(run=_card)

    ready = commands.add_parser("ready", help="whether a model answers now")
    ready.add_argument("model", type=name)
    ready.set_defaults(run=_ready)

    added = [(point.name, point.load()(commands)) for point in entry_points(group=GROUP)]

    for command in (predict, explain, strongest, card, ready, *(command for _, command in added)):
        command.add_argument("--version", type=name, help="version of the model (default: the server's default)")
        command.add_argument(
            "--url", default="http://localhost:8080", help="http(s):// or grpc(s)://host:port (default %(default)s)"
        )
        command.add_argument("--ca-file", metavar="FILE", help="PEM file of the certificates to trust")
        command.add_argument("--deadline-s", default=30.0, type=float, metavar="S", help="seconds it may take (30)")
        command.add_argument("--retries", default=3, type=int, metavar="N", help="how often it is asked again (3)")
        if command is not strongest and command.prog.split()[-1] not in ("probe", "ui"):  # Whose requests are many.
            command.add_argument(
                "--request-id", type=request_id, metavar="ID", help="what the service's log calls it (default: made)"
            )
        command.add_argument("--json", action="store_true", help="answer in JSON, for programs")
    return parser


def _predict(client: Client, options: argparse.Namespace) -> int:
    """Ask about pictures; show, and save if asked."""
    from convscope._cli_pictures import ask_about
    from convscope._report import predictions_json, predictions_text

    asked = _chosen(options, "model version layers top_k map_dtype pool channels timing request_id")
    rows = ask_about(options.pictures, lambda files: client.predict(files, **asked), save=options.save)
    print(as_json(predictions_json(rows)) if options.json else predictions_text(rows))
    return 1 if any(row.error is not None for row in rows) else 0


def _explain(client: Client, options: argparse.Namespace) -> int:
    """Ask what scores rest on; show, and save if asked."""
    from convscope._cli_pictures import ask_about
    from convscope._explain_report import explanations_json, explanations_text

    asked = _chosen(options, "model version method layer target window step steps request_id")
    rows = ask_about(options.pictures, lambda files: client.explain(files, **asked), save=options.save)
    print(as_json(explanations_json(rows)) if options.json else explanations_text(rows))
    return 1 if any(row.error is not None for row in rows) else 0


def _strongest(client: Client, options: argparse.Namespace) -> int:
    """Look for what a channel answers to; show, and save if asked."""
    from convscope._explain_report import find_strongest, patches_json, patches_text, save_patches

    asked = _chosen(options, "model version layer channel n per_picture")
    found = find_strongest(client, options.pictures, save=options.save, **asked)
    saved = [] if options.save is None else save_patches(found, options.save)
    print(as_json(patches_json(found, saved)) if options.json else patches_text(found, saved))
    return 1 if found.failed else 0


def _chosen(options: argparse.Namespace, which: str) -> dict[str, Any]:
    """Return the options that go with a question, by name."""
    return {name: getattr(options, name) for name in which.split()}


def _card(client: Client, options: argparse.Namespace) -> int:
    """Show a model's card."""
    from convscope._card_report import card_text

    card = client.model_card(options.model, options.version, request_id=options.request_id)
    print(as_json(dataclasses.asdict(card)) if options.json else card_text(card))
    return 0


def _ready(client: Client, options: argparse.Namespace) -> int:
    """Say whether a model answers, and if not, why."""
    reason = None
    try:
        client.model_card(options.model, options.version, request_id=options.request_id)
    except ConvscopeError as error:
        reason = error
    if options.json:
        answer: dict[str, object] = {"model": options.model, "ready": reason is None, "error": None}
        if reason is not None:
            answer["error"] = {"code": reason.code, "message": reason.message, "request_id": reason.request_id}
        print(as_json(answer))
    elif reason is None:
        print(f"{options.model} is ready")
    else:
        print(f"convscope: {options.model} is not ready: {reason.code}: {_one_line(str(reason))}", file=sys.stderr)
    return 0 if reason is None else 1


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
