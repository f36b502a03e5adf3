"""Archives: from a checkpoint, or a network of your own, to a `.mar` that a stock TorchServe loads.

    python -m training.archive --checkpoint runs/cifar/checkpoint.pt
    python -m training.archive --arch torchvision.models:resnet18 --arguments '{"num_classes": 10}' --name pets \
        --state-dict weights.pt --classes classes.txt --layers conv1=relu,deep=layer4.1.add --size 224x224 \
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
    python -m training.archive --arch path/to/net.py:Net --name mine ...    # without --layers: what there is
    python -m training.archive --check      # do the archives of model_store/ hold today's handlers/?
    python -m training.archive --refresh    # put today's handlers/ into them; weights, card and graph stay
    python -m training.archive --refresh --engine onnx    # and export their graphs for ONNX Runtime anew

The same input gives the same bytes, in every process and checkout. The source of your own network travels in the
archive: the one file, or all Python files of its package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from handlers.images import Preprocessing
from training import packing
from training.contents import Contents, from_checkpoint, from_files
from training.custom import from_network, read_classes
from training.engine import ENGINES, with_engine
from training.packing import ArchiveError

STORE = packing.HANDLERS.parent / "model_store"


def build(contents: Contents, store: Path = STORE) -> Path:
    """Write the archive of a model.

    Args:
        contents: The model.
        store: Folder for `<model>.mar`.

    Returns:
        Where it is.

    Raises:
        ArchiveError: The contents do not make a model that can be served.
    """
    archive = packing.pack(contents.files())
    path = store / f"{contents.card['model']}.mar"
    packing.write(path, archive)
    return path


def refreshed(path: Path, engine: str | None = None) -> bytes:
    """Return the archive as a fresh build would make it from its own weights and card and today's handlers.

    Args:
        path: The archive.
        engine: One of `ENGINES`; None keeps the graph it has, if any.

    Raises:
        ArchiveError: It is no archive of ours, or its weights no longer fit.
    """
    contents = from_files(packing.unpack(path))
    return packing.pack((with_engine(contents, engine)[0] if engine else contents).files())


def differences(path: Path) -> list[str]:
    """Return what in an archive is not as a fresh build would have it; empty when it is up to date.

    Raises:
        ArchiveError: It cannot be rebuilt.
    """
    packed = packing.unpack(path)
    fresh = from_files(packed).files()
    found = [f"{name} is missing" for name in sorted(fresh.keys() - packed.keys())]
    found += [f"{name} is no longer part of it" for name in sorted(packed.keys() - fresh.keys())]
    found += [f"{name} differs" for name in sorted(fresh.keys() & packed.keys()) if fresh[name] != packed[name]]
    if not found and path.read_bytes() != packing.pack(fresh):
        found.append("the files agree, but the zip around them was written by something else")
    return found


def check(store: Path = STORE) -> list[str]:
    """Return one line for everything in a store that is out of date, or for there being no archive at all."""
    archives = sorted(store.glob("*.mar"))
    lines = [] if archives else [f"{store} holds no archive to check; build one with --checkpoint"]
    for path in archives:
        try:
            lines += [f"{path.name}: {difference}" for difference in differences(path)]
        except ArchiveError as err:
            lines.append(f"{path.name}: cannot be rebuilt: {err}")
    return lines


def _keyword_arguments(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as err:
        raise argparse.ArgumentTypeError(f"not JSON: {err}") from err
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError('not a JSON object such as {"num_classes": 10}')
    return values


def _layers(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if not all(equals and node.strip() for _, equals, node in pairs) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NODE,NAME=NODE with every name once")
    return {name.strip(): node.strip() for name, _, node in pairs}


def _size(text: str) -> tuple[int | None, int | None]:
    if text == "any":
        return None, None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HEIGHTxWIDTH, such as 224x224, nor any")
    return int(height), int(width)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.485,0.456,0.406") from err


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; on a mistake in it, say so and exit with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.archive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--checkpoint", type=Path, metavar="FILE", help="archive what training.train wrote")
    action.add_argument("--arch", metavar="WHERE:NAME", help="archive path/to/net.py:Net or package.module:Net")
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
    own = parser.add_argument_group("with --arch")
    own.add_argument("--name", help="name to serve the model under")
    own.add_argument("--description", default="", help="one sentence for the model card")
    own.add_argument(
        "--arguments", type=_keyword_arguments, default={}, metavar="JSON", help="the constructor's keyword arguments"
    )
    own.add_argument("--state-dict", type=Path, metavar="FILE", help="weights: torch.save(model.state_dict(), FILE)")
    own.add_argument("--random-weights", type=int, metavar="SEED", help="no weights: fresh ones from this seed")
    own.add_argument("--classes", type=Path, metavar="FILE", help="one label a line; without it there are no scores")
    own.add_argument("--layers", type=_layers, default={}, metavar="NAME=NODE,...", help="the maps to publish")
    own.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="pixels, or any (default: 224x224)")
    own.add_argument("--channels", type=int, default=3, help="3 for colour (default), 1 for grey")
    own.add_argument("--mean", type=_numbers, default=(), metavar="R,G,B", help="subtracted from values in 0..1")
    own.add_argument("--std", type=_numbers, default=(), metavar="R,G,B", help="divided by after that")
    arguments = parser.parse_args(argv)
    if arguments.half and arguments.checkpoint is None:
        parser.error("--half can only be given with --checkpoint")
    if arguments.arch is None:
        stray = [option.option_strings[0] for option in own._group_actions if _is_set(arguments, option)]
        if stray:
            parser.error(f"{', '.join(stray)} can only be given with --arch")
        return arguments
    if not arguments.name:
        parser.error("--arch needs --name, under which the model will be served")
    if (arguments.state_dict is None) == (arguments.random_weights is None):
        parser.error("give the weights with --state-dict FILE, or ask for none with --random-weights SEED")
    try:
        height, width = arguments.size
        arguments.preprocessing = Preprocessing(arguments.channels, height, width, arguments.mean, arguments.std)
    except ValueError as err:
        parser.error(f"--channels, --size, --mean and --std do not fit: {err}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 out of date or not possible.
    """
    arguments = parse(argv)
    try:
        if arguments.check:
            return _check(arguments.store)
        if arguments.refresh:
            return _refresh(arguments.store, arguments.engine)
        if arguments.checkpoint:
            contents = from_checkpoint(arguments.checkpoint, arguments.version, half=arguments.half)
        else:
            contents = _own(arguments)
        contents, engine = with_engine(contents, arguments.engine or "auto")
        path = build(contents, arguments.store)
    except ArchiveError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"{_summary(path, packing.unpack(path))}\nserved by: {engine}")
    return 0


def _own(arguments: argparse.Namespace) -> Contents:
    return from_network(
        arguments.arch,
        name=arguments.name,
        version=arguments.version,
        description=arguments.description,
        arguments=arguments.arguments,
        state_dict=arguments.state_dict,
        seed=arguments.random_weights,
        classes=read_classes(arguments.classes) if arguments.classes else [],
        layers=arguments.layers,
        preprocessing=arguments.preprocessing,
    )


def _is_set(arguments: argparse.Namespace, option: argparse.Action) -> bool:
    return bool(getattr(arguments, option.dest) != option.default)


def _check(store: Path) -> int:
    lines = check(store)
    for line in lines:
        print(line, file=sys.stderr)
    if any(store.glob("*.mar")) and lines:
        print("rebuild with: python -m training.archive --refresh", file=sys.stderr)
    return 1 if lines else 0


def _refresh(store: Path, engine: str | None) -> int:
    archives = sorted(store.glob("*.mar"))
    if not archives:
        raise ArchiveError(f"{store} holds no archive; build one from a checkpoint first")
    for path in archives:
        fresh = refreshed(path, engine)
        changed = fresh != path.read_bytes()
        if changed:
            packing.write(path, fresh)
        print(f"{path.name}: {'rewritten' if changed else 'up to date'}")
    return 0


def _summary(path: Path, files: Mapping[str, bytes]) -> str:
    card = json.loads(files[packing.CARD])
    layers = ", ".join(f"{name} = {node}" for name, node in card["layers"].items())
    return f"{path}  {path.stat().st_size:,} bytes, version {card['version']}\nlayers: {layers}"


if __name__ == "__main__":
    sys.exit(main())
