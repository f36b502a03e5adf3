"""Recipes: how a network's pictures are resized and cropped, published by its library or set on the command line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchvision import models

from archiver.packing import ArchiveError
from handlers.images.decoding import DEFAULT_MAX_PIXELS
from handlers.images.preprocessing import CONTAIN, COVER, FILTERS, Preprocessing

SQUASH, TORCHVISION, TIMM = "squash", "torchvision", "timm"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of a recipe to a command line."""
    group.add_argument(
        "--preprocessing",
        dest="recipe",
        choices=(TORCHVISION, TIMM, SQUASH),
        help="the recipe to begin with: the one that the library publishes for the network (default for torchvision's "
        "classifiers and timm's networks), or the whole picture squashed to the network's size (default for others); "
        "the next options change it",
    )
    group.add_argument(
        "--resize",
        type=_sides,
        metavar="N|HxW",
        help="resize pictures first: the shorter side to N pixels, or to HxW; the middle is then cut out",
    )
    group.add_argument("--crop", type=_sides, metavar="N|HxW", help="the middle to cut out: the network's size")
    group.add_argument("--interpolation", choices=tuple(FILTERS), help="how pictures are resized (default: bilinear)")
    group.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="widen the filter where a picture becomes smaller, as Pillow does (default)",
    )
    group.add_argument(
        "--bgr",
        action=argparse.BooleanOptionalAction,
        help="the network takes blue first; --mean and --std are in that order then",
    )


def _sides(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels, such as 256, nor HEIGHTxWIDTH")
    sides = tuple(map(int, parts))
    if sides[0] * sides[-1] > DEFAULT_MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {DEFAULT_MAX_PIXELS:,} pixels, the most of a picture")
    return sides


def resolve_preprocessing(options: argparse.Namespace, source: str, published: Preprocessing | None) -> Preprocessing:
    """Return a network's preprocessing: a recipe, changed by the options of the command line.

    Args:
        options: `recipe`, `resize`, `crop`, `interpolation`, `antialias`, `bgr`, `size`, `channels`, `mean`, `std`.
        source: The library that publishes a recipe for the network; empty for none.
        published: That recipe; None without a library.

    Raises:
        ArchiveError: The options contradict each other or the recipe.
        ValueError: The fields of the recipe do not fit together.
    """
    if options.recipe in (TORCHVISION, TIMM) and options.recipe != source:
        raise ArchiveError(
            f"--preprocessing {options.recipe}: {options.recipe} publishes no recipe for this network; say it with "
            "--resize, --crop, --interpolation, --mean and --std"
        )
    if bool(options.mean) != bool(options.std):
        raise ArchiveError("give --mean and --std together: a picture is normalised with both or not at all")
    if options.crop and options.size:
        raise ArchiveError("--size and --crop both say the network's size; give one of them")
    start = published or Preprocessing(3, 224, 224)
    if options.recipe == SQUASH:
        if options.resize or options.crop:
            raise ArchiveError(
                "--preprocessing squash cannot be combined with --resize or --crop: leave out one or the other"
            )
        start = replace(start, resize=(), fit="", fill=(), interpolation="bilinear", antialias=True)
    if options.size and options.size[0] and start.resize and not options.resize:
        start = _scaled(start, options.size)
    height, width = (
        options.size or (options.crop and (options.crop[0], options.crop[-1])) or (start.height, start.width)
    )
    resize = options.resize or (start.resize if height else ())
    if resize != start.resize:
        start = replace(start, resize=(), fit="", fill=())
    if height and width:
        _check_sizes(options, resize, (height, width))
    given = {name: getattr(options, name) for name in ("interpolation", "antialias", "bgr")}
    changes = {name: value for name, value in given.items() if value is not None}
    if not height and not resize:
        if changes.keys() & {"interpolation", "antialias"}:
            raise ArchiveError("--interpolation and --antialias say how to resize; --size any alone does not resize")
        start = replace(start, interpolation="bilinear")  # Nothing uses it.
    mean, std = (options.mean, options.std) if options.mean else (start.mean, start.std)
    channels = start.channels if options.channels is None else options.channels
    if len(mean) not in (0, channels) or len(std) not in (0, channels) or 0 in std:
        raise ArchiveError(
            f"--mean and --std need {channels} values each (one a channel), none of --std 0; got {len(mean)} and "
            f"{len(std)}"
        )
    return replace(start, channels=channels, height=height, width=width, mean=mean, std=std, resize=resize, **changes)


def describe(preprocessing: Preprocessing) -> str:
    """Return how a picture becomes the network's input, in one line."""
    parts = [_describe_size(preprocessing)]
    if preprocessing.fill:
        parts.append(f"padded with {_spelt(preprocessing.fill)}")
    if preprocessing.bgr:
        parts.append("blue first")
    if preprocessing.mean:
        parts.append(f"mean {_spelt(preprocessing.mean)}, std {_spelt(preprocessing.std)}")
    return "; ".join(parts)


def _spelt(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _describe_size(preprocessing: Preprocessing) -> str:
    size, resize = preprocessing.size, "x".join(map(str, preprocessing.resize))
    if size is None and not resize:
        return "as they are, of any size"
    target = f"{size[0]}x{size[1]}" if size else "any size"
    how = preprocessing.interpolation + ("" if preprocessing.antialias else " without antialiasing")
    if not resize:
        return f"squashed to {target}, {how}"
    if preprocessing.fit:
        resize = f"{'at least' if preprocessing.fit == COVER else 'at most'} {resize}"
    elif len(preprocessing.resize) == 1:
        resize = f"{resize} on the shorter side"
    return f"resized to {resize}, {how}{f', then the middle {target}' if size and resize != target else ''}"


def _scaled(recipe: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """Return a recipe for another size that shows the network the same share of a picture."""
    assert recipe.size is not None  # noqa: S101  # For the type checker: a published recipe has a size.
    if size == recipe.size:
        return recipe
    sides = (recipe.resize[0], recipe.resize[-1])
    height, width = (round(side * new / old) for side, new, old in zip(sides, size, recipe.size, strict=True))
    if len(recipe.resize) == 1 and height == width:
        return replace(recipe, height=size[0], width=size[1], resize=(height,))
    fit = recipe.fit or (COVER if len(recipe.resize) == 1 else "")
    return replace(recipe, height=size[0], width=size[1], resize=(height, width), fit=fit)


def _check_sizes(options: argparse.Namespace, resize: tuple[int, ...], size: tuple[int, int]) -> None:
    """Check that the sizes on the command line fit together.

    Raises:
        ArchiveError: They do not; the message says what would be right.
    """
    spelt = f"{size[0]}x{size[1]}"
    if options.crop and not resize:
        raise ArchiveError(
            f"--crop cuts out the middle of a resized picture: give --resize too, such as --resize {min(size)}; or "
            f"--size {spelt}, which squashes the whole picture"
        )
    is_short = bool(resize) and any(side < length for side, length in zip((resize[0], resize[-1]), size, strict=True))
    if is_short and ((options.crop and not options.resize) or (options.resize and not (options.crop or options.size))):
        raise ArchiveError(
            f"resized to {'x'.join(map(str, resize))}, every picture is smaller than the network's {spelt} and would "
            f"be padded; give both, such as --resize {min(size)} --crop {spelt}"
        )


def of_torchvision(transforms: Any) -> Preprocessing:
    """Return the recipe of torchvision's published weights, for Pillow's pictures, which are always antialiased.

    Args:
        transforms: What `Weights.transforms()` returns.
    """
    size, mean, std = transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std)
    shorter, interpolation = transforms.resize_size[0], transforms.interpolation.value
    return Preprocessing(3, size, size, mean, std, resize=(shorter,), interpolation=interpolation)


def torchvision_name(architecture: str) -> str:
    """Return torchvision's name of a classifier; empty if torchvision does not have it.

    Args:
        architecture: The architecture as `--arch` takes it: `torchvision.models:resnet18`.
    """
    place, _, name = architecture.partition(":")
    return name if place == "torchvision.models" and name in models.list_models(module=models) else ""


def timm_name(architecture: str, arguments: Mapping[str, Any]) -> str | None:
    """Return timm's name of a network; None if the network is not timm's, or has no name there.

    Args:
        architecture: The architecture as `--arch` takes it: `timm:create_model`, or `timm.models.resnet:resnet10t`.
        arguments: The constructor's keyword arguments.
    """
    place, _, name = architecture.partition(":")
    if place.split(".")[0] != "timm":
        return None
    if name == "create_model":
        return str(arguments["model_name"]) if "model_name" in arguments else None
    try:
        import timm
    except ModuleNotFoundError:  # The archiver reports it when it looks for the network.
        return None
    return name if timm.is_model(name) else None


def find_timm(name: str) -> str:
    """Return timm's current name of a network.

    Args:
        name: The name as `timm.create_model` takes it, with or without the tag of its weights.

    Raises:
        ArchiveError: timm is not installed, or has no such network or weights.
    """
    try:
        import timm
    except ModuleNotFoundError as err:
        raise ArchiveError(f"{name} is a network of the package timm: pip install timm") from err
    renamed: dict[str, str] = {old: new for old, new in timm.models.get_deprecated_models().items() if new}
    known = {*timm.list_models(), *timm.list_models(include_tags=True), *renamed}
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), 5, 0.6)
        advice = f"it has {', '.join(near)}" if near else "timm.list_models() lists what it has"
        raise ArchiveError(f"timm has no network {name!r}; {advice}")
    return renamed.get(name, name)


def timm_preprocessing(name: str, arguments: Mapping[str, Any] | None = None) -> Preprocessing:
    """Return the recipe that timm publishes for a network: what `timm.data.create_transform` does for evaluation.

    Args:
        name: The name as `timm.create_model` takes it.
        arguments: Keyword arguments of `timm.create_model`. Also `mean` and `std`, which replace the published ones.

    Raises:
        ArchiveError: timm is not installed, has no such network, or its recipe does not fit the network.
    """
    name = find_timm(name)
    data: Any = importlib.import_module("timm.data")  # The module has no types.
    given = dict(arguments or {})
    found = data.resolve_data_config({"in_chans": 3}, pretrained_cfg=_published_by_timm(name, given))
    channels = int(given.get("in_chans") or 3)
    own = given.get("img_size") or found["input_size"][1:]
    height, width = (own, own) if isinstance(own, int) else own
    scaled = tuple(math.floor(side / found["crop_pct"]) for side in (height, width))
    mean, std = (_for_channels(name, given.get(key) or found[key], channels) for key in ("mean", "std"))
    recipe: dict[str, Any] = {"resize": scaled}
    if found["crop_mode"] == "border":
        recipe |= {"fit": CONTAIN, "fill": tuple(round(255 * value) for value in mean)}
    elif found["crop_mode"] != "squash":
        recipe = {"resize": scaled[:1]} if height == width else {"resize": scaled, "fit": COVER}
    return Preprocessing(channels, height, width, mean, std, interpolation=found["interpolation"], **recipe)


def _published_by_timm(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's facts about a network's weights, as `timm.create_model` with these arguments would use them."""
    from timm.models import get_pretrained_cfg

    own = arguments.get("pretrained_cfg")
    if isinstance(own, str):
        name = f"{name.split('.')[0]}.{own}"
    try:
        published: Any = get_pretrained_cfg(name)
    except RuntimeError as err:
        raise ArchiveError(f"timm has no weights {name!r}: {err}") from err
    facts = own if isinstance(own, Mapping) else published.to_dict() if published else {}
    return {**facts, **(arguments.get("pretrained_cfg_overlay") or {})}


def _for_channels(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a number for each channel, if that is unambiguous.

    Raises:
        ArchiveError: It is ambiguous.
    """
    if len(values) != channels and len(set(values)) > 1:
        raise ArchiveError(
            f"timm normalises pictures of {len(values)} channels for {name}, and this network takes {channels}: give "
            "--mean and --std for its channels"
        )
    return tuple(values) if len(values) == channels else (values[0],) * channels
