"""Arguments: the command line of `python -m archiver`, read and checked."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from archiver.external import AUTO, look_up_timm, look_up_torchvision
from archiver.graph import ENGINES
from archiver.packing import ArchiveError
from archiver.recipes import (
    TIMM,
    TORCHVISION,
    add_options,
    resolve_preprocessing,
    timm_name,
    timm_preprocessing,
    torchvision_name,
)
from archiver.store import STORE
from handlers.images.decoding import DEFAULT_MAX_PIXELS
from handlers.network.archive import NONE, SCORES
from handlers.network.layouts import TOKENS
from handlers.network.layouts import parse as parse_layout

_OWN = "with --arch, --torchvision or --timm"
_OF_RECIPE = ("channels", "size", "resize", "crop", "interpolation", "antialias", "bgr")


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
    for _, _, node in pairs:
        _, at, word = node.strip().partition("@")
        if at and word != "channels_first":
            try:
                parse_layout(word)
            except ValueError as err:
                raise argparse.ArgumentTypeError(str(err)) from err
    return {name.strip(): node.strip() for name, _, node in pairs}


def _grid(text: str) -> str:
    grid = text if "+" in text else f"{text}+0"
    try:
        parse_layout(f"{TOKENS}:{grid}")
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither HEIGHTxWIDTH in patches, nor that with +N for N other tokens before them: 14x14+1"
        ) from err
    return grid


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
    """Parse the command line; on a mistake, print it and exit with status 2.

    Args:
        argv: Arguments without the program's name; None for the arguments of the process.
        description: Description of the program.

    Returns:
        The options. For a network of the user or a library also `preprocessing`, and `labels` from the library.
    """
    parser = _parser(description)
    arguments = parser.parse_args(argv)
    if arguments.half and arguments.checkpoint is None:
        parser.error("--half can only be given with --checkpoint")
    if arguments.sign and arguments.check:
        parser.error("--check writes nothing that --sign could sign")
    if arguments.arch is arguments.torchvision is arguments.timm is None:
        own = (option for group in parser._action_groups if group.title == _OWN for option in group._group_actions)
        stray = [option.option_strings[0] for option in own if getattr(arguments, option.dest) != option.default]
        if stray:
            parser.error(f"{', '.join(stray)} can only be given {_OWN}")
        return arguments
    if (arguments.state_dict is None) == (arguments.random_weights is None):
        parser.error("give the weights with --state-dict FILE, or ask for none with --random-weights SEED")
    if arguments.ema and arguments.state_dict is None:
        parser.error("--ema chooses between the weights that a file holds: it goes with --state-dict")
    try:
        _complete(arguments)
    except ValueError as err:
        given = [f"--{name}" for name in _OF_RECIPE if getattr(arguments, name) not in (None, ())]
        parser.error(f"{', '.join(given) or 'the recipe'}: {err}")
    except ArchiveError as err:
        parser.error(str(err))
    if not arguments.name:
        parser.error("--arch needs --name, under which the model will be served")
    return arguments


def _complete(arguments: argparse.Namespace) -> None:
    """Fill in what the network itself defines and the command line leaves out."""
    source, preprocessing = "", None
    arguments.labels = ()
    said = {**arguments.arguments, "mean": arguments.mean, "std": arguments.std}
    if arguments.size and arguments.size[0]:
        said["img_size"] = arguments.size
    if arguments.timm is not None:
        published = look_up_timm(arguments.timm, said)
        arguments.arch = published.architecture
        arguments.name = arguments.name or published.architecture.partition(":")[2]
        arguments.arguments = {**published.arguments, **arguments.arguments}
        source, preprocessing = TIMM, published.preprocessing
        arguments.labels = () if arguments.scores == NONE else published.classes
    elif name := arguments.torchvision or torchvision_name(arguments.arch):
        published = look_up_torchvision(name, arguments.state_dict, arguments.arguments)
        arguments.arch = published.architecture
        arguments.arguments = {**published.arguments, **arguments.arguments}
        source, preprocessing = TORCHVISION, published.preprocessing
        count = len(published.classes)
        if arguments.torchvision and arguments.scores != NONE:
            arguments.labels = published.classes if arguments.arguments.get("num_classes", count) == count else ()
        arguments.name = arguments.name or arguments.torchvision
        if published.is_guess and not (arguments.recipe or arguments.resize or arguments.crop):
            taken = "preprocessing and labels" if arguments.labels and not arguments.classes else "preprocessing"
            print(
                f"note: {arguments.state_dict.name} is none of the names that torchvision publishes weights of {name} "
                f"under; taken: {taken} of {published.weights}. If others are meant, keep the published name of the "
                "file, or give --resize, --crop, --interpolation, --mean and --std, and --classes",
                file=sys.stderr,
            )
    elif (timm := timm_name(arguments.arch, arguments.arguments)) is not None:
        source, preprocessing = TIMM, timm_preprocessing(timm, said)
    arguments.preprocessing = resolve_preprocessing(arguments, source, preprocessing)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m archiver",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--checkpoint", type=Path, metavar="FILE", help="archive what training.train wrote")
    action.add_argument(
        "--arch",
        metavar="WHERE:NAME",
        help="archive path/to/net.py:Net, package.module:Net or package.module:Net.method",
    )
    action.add_argument("--torchvision", metavar="NAME", help="archive a classifier of torchvision's, such as resnet18")
    action.add_argument("--timm", metavar="NAME", help="archive a network of timm's, such as resnet50.a1_in1k")
    action.add_argument("--check", action="store_true", help="exit 1 when an archive of the store is out of date")
    action.add_argument(
        "--refresh", action="store_true", help="bring the store's archives to today's handlers/ and format"
    )
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="the archives' folder: model_store")
    parser.add_argument("--version", default="1.0", help="the model's version (default: 1.0)")
    parser.add_argument("--half", action="store_true", help="with --checkpoint: keep the weights as float16")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="onnx: with a graph for ONNX Runtime, torch: without, auto: with one if it can be exported here (default; "
        "--refresh: what the archive has)",
    )
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="sign what is written with this Ed25519 key of OpenSSH's, by ssh-keygen: ARCHIVE.sig",
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
        help="pack this installed package too, if the archiver does not find that the network uses it; repeatable",
    )
    own.add_argument("--ema", action="store_true", help="take the moving average that FILE holds beside the weights")
    own.add_argument(
        "--random-weights",
        type=int,
        metavar="SEED",
        help="initialise the network from this seed instead of reading weights",
    )
    own.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="one label a line, in the order of the outputs (default: those that the library publishes with "
        "--torchvision or --timm, if the network has as many outputs; else none, and no scores are served)",
    )
    own.add_argument(
        "--scores",
        choices=SCORES,
        help="what the outputs mean: softmax: mutually exclusive classes (default), sigmoid: multi-label classes, "
        "value: regression, numbers that --classes names, none: nothing that is to be served (default without classes)",
    )
    own.add_argument(
        "--probabilities",
        action=argparse.BooleanOptionalAction,
        help="the network applies the softmax or sigmoid itself (default: found out)",
    )
    own.add_argument(
        "--output",
        default="",
        metavar="KEY",
        help="key or index of the scores, if the network returns several tensors: heads.1",
    )
    own.add_argument(
        "--layers",
        type=_layers,
        default={},
        metavar="NAME=NODE,...",
        help="the maps to publish, or auto for those that are proposed without this option; output:KEY is what the "
        "network returns by that name; NODE@LAYOUT says which axis is which where that cannot be found: "
        "channels_first, channels_last, plane, tokens:HxW+N",
    )
    own.add_argument(
        "--tokens",
        type=_grid,
        metavar="HxW+N",
        help="grid of patches and number of extra tokens before them: 14x14+1 (default: found out)",
    )
    own.add_argument(
        "--size", type=_size, metavar="HxW|any", help="the network's size, or any (default: the recipe's, else 224x224)"
    )
    add_options(own)
    own.add_argument(
        "--channels", type=int, help="3 for colour, 1 for grey, others for arrays (default: the recipe's, else 3)"
    )
    own.add_argument(
        "--mean", type=_numbers, default=(), metavar="M,...", help="one a channel: subtracted from values in 0..1"
    )
    own.add_argument("--std", type=_numbers, default=(), metavar="S,...", help="one a channel: divided by after that")
    return parser
