"""Arguments: the command line of `python -m archiver`, read and checked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from archiver.external import AUTO, look_up, look_up_timm
from archiver.graph import ENGINES
from archiver.packing import ArchiveError
from archiver.store import STORE
from handlers.images.decoding import DEFAULT_MAX_PIXELS
from handlers.images.preprocessing import Preprocessing

_OWN = "with --arch, --torchvision or --timm"


def _keyword_arguments(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as err:
        raise argparse.ArgumentTypeError(f"not JSON: {err}") from err
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError('not a JSON object such as {"num_classes": 10}')
    return values


def _layers(text: str) -> dict[str, str] | str:
    if text == AUTO:
        return AUTO
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if not all(equals and node.strip() for _, equals, node in pairs) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NODE,NAME=NODE with every name once, nor auto")
    return {name.strip(): node.strip() for name, _, node in pairs}


def _size(text: str) -> tuple[int | None, int | None]:
    if text == "any":
        return None, None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HEIGHTxWIDTH, such as 224x224, nor any")
    if int(height) * int(width) > DEFAULT_MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {DEFAULT_MAX_PIXELS:,} pixels, the most of a picture")
    return int(height), int(width)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.485,0.456,0.406") from err


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Read the command line; on a mistake in it, say so and exit with status 2.

    Args:
        argv: Without the program's name; None for those of the process.
        description: Of the program.

    Returns:
        The options. With a network of the user's or a library's also `preprocessing`, and `labels` from the library.
    """
    parser = _parser(description)
    arguments = parser.parse_args(argv)
    if arguments.half and arguments.checkpoint is None:
        parser.error("--half can only be given with --checkpoint")
    if arguments.arch is arguments.torchvision is arguments.timm is None:
        own = (option for group in parser._action_groups if group.title == _OWN for option in group._group_actions)
        stray = [option.option_strings[0] for option in own if getattr(arguments, option.dest) != option.default]
        if stray:
            parser.error(f"{', '.join(stray)} can only be given {_OWN}")
        return arguments
    if (arguments.state_dict is None) == (arguments.random_weights is None):
        parser.error("give the weights with --state-dict FILE, or ask for none with --random-weights SEED")
    try:
        _complete(arguments)
    except ValueError as err:
        parser.error(f"--channels, --size, --mean and --std do not fit: {err}")
    except ArchiveError as err:
        parser.error(str(err))
    if not arguments.name:
        parser.error("--arch needs --name, under which the model will be served")
    return arguments


def _complete(arguments: argparse.Namespace) -> None:
    """Put in what the network itself says, where the command line says nothing."""
    preprocessing = Preprocessing(3, 224, 224)
    arguments.labels = ()
    if arguments.timm is not None:
        own = {"mean": arguments.mean, "std": arguments.std}
        published = look_up_timm(arguments.timm, {**arguments.arguments, **own})
        arguments.arch = published.architecture
        arguments.name = arguments.name or published.architecture.partition(":")[2]
        arguments.arguments = {**published.arguments, **arguments.arguments}
        preprocessing, arguments.labels = published.preprocessing, published.classes
    if arguments.torchvision is not None:
        published = look_up(arguments.torchvision, arguments.state_dict)
        arguments.arch = published.architecture
        arguments.name = arguments.name or arguments.torchvision
        preprocessing = published.preprocessing
        if arguments.arguments.get("num_classes", len(published.classes)) == len(published.classes):
            arguments.labels = published.classes
    height, width = arguments.size or (preprocessing.height, preprocessing.width)
    mean, std = preprocessing.mean, preprocessing.std
    if arguments.mean or arguments.std:
        mean, std = arguments.mean, arguments.std
    arguments.preprocessing = Preprocessing(arguments.channels or preprocessing.channels, height, width, mean, std)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m archiver",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--checkpoint", type=Path, metavar="FILE", help="archive what training.train wrote")
    action.add_argument("--arch", metavar="WHERE:NAME", help="archive path/to/net.py:Net or package.module:Net")
    action.add_argument("--torchvision", metavar="NAME", help="archive a classifier of torchvision's, such as resnet18")
    action.add_argument("--timm", metavar="NAME", help="archive a network of timm's, such as resnet50.a1_in1k")
    action.add_argument("--check", action="store_true", help="exit 1 when an archive of the store is out of date")
    action.add_argument("--refresh", action="store_true", help="put today's handlers/ into the archives of the store")
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="the archives' folder: model_store")
    parser.add_argument("--version", default="1.0", help="the model's version (default: 1.0)")
    parser.add_argument("--half", action="store_true", help="with --checkpoint: keep the weights as float16")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="onnx: with a graph for ONNX Runtime, torch: without, auto: with one if it can be exported here (default; "
        "--refresh: what the archive has)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not write what the archiver is doing")
    own = parser.add_argument_group(_OWN)
    own.add_argument("--name", help="name to serve the model under (default: torchvision's or timm's)")
    own.add_argument("--description", default="", help="one sentence for the model card")
    own.add_argument(
        "--arguments", type=_keyword_arguments, default={}, metavar="JSON", help="the constructor's keyword arguments"
    )
    own.add_argument(
        "--state-dict",
        type=Path,
        metavar="FILE",
        help="weights: a state dict, a checkpoint that holds one, FILE.safetensors or the index of several",
    )
    own.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME",
        help="an installed package or module that travels though its use was not found out; may be repeated",
    )
    own.add_argument("--ema", action="store_true", help="take the moving average that FILE holds beside the weights")
    own.add_argument("--random-weights", type=int, metavar="SEED", help="no weights: fresh ones from this seed")
    own.add_argument("--classes", type=Path, metavar="FILE", help="one label a line; without, no scores are served")
    own.add_argument(
        "--layers",
        type=_layers,
        default={},
        metavar="NAME=NODE,...",
        help="the maps to publish, or auto for those that are proposed without this option",
    )
    own.add_argument("--size", type=_size, metavar="HxW", help="pixels, or any (default: the library's, or 224x224)")
    own.add_argument("--channels", type=int, help="3 for colour (default), 1 for grey")
    own.add_argument("--mean", type=_numbers, default=(), metavar="R,G,B", help="subtracted from values in 0..1")
    own.add_argument("--std", type=_numbers, default=(), metavar="R,G,B", help="divided by after that")
    return parser
