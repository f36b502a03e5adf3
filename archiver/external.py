"""External networks: a user's own, torchvision's or timm's, from constructor, weights and layers to an archive.

Nothing is downloaded: what published weights take and mean comes with the package, the weights themselves from a file.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from archiver import packing
from archiver.architecture import find
from archiver.contents import FORMAT, Contents
from archiver.packages import complete, describe, find_named
from archiver.packing import ArchiveError
from archiver.proposal import propose, table
from archiver.survey import listing, survey
from archiver.weights import load
from handlers.images.preprocessing import Preprocessing, noise

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Instead of layers: those that `propose` chooses."""

_IMAGENET = tuple(models.ResNet18_Weights.DEFAULT.meta["categories"])
_FETCHING = ("weights", "weights_backbone", "pretrained", "checkpoint_path")  # Arguments of torchvision's and timm's.


@dataclass(frozen=True)
class Published:
    """A network of torchvision's or timm's and one set of its weights.

    Attributes:
        architecture: The builder, as `--arch` takes it.
        weights: The name of those weights, such as `IMAGENET1K_V1`.
        preprocessing: What a picture becomes. torchvision first scales the shorter side and crops the middle; here the
            whole picture is brought to the same size.
        classes: Labels in the order of the outputs; empty where nobody publishes what the outputs mean.
        arguments: Keyword arguments of the builder that go with the name.
    """

    architecture: str
    weights: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    arguments: Mapping[str, object] = field(default_factory=dict)


def look_up(name: str, state_dict: Path | None = None) -> Published:
    """Look up a classifier of torchvision's.

    Args:
        name: Such as `resnet18`.
        state_dict: A weights file; if it still has the name it is published under, the facts are of those weights, else
            of torchvision's default ones.

    Raises:
        ArchiveError: torchvision has no such classifier.
    """
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        raise ArchiveError(f"torchvision has no classifier {name!r}; it has {', '.join(near or known)}")
    entries = list(models.get_model_weights(name))
    default = models.get_model_weights(name).DEFAULT
    named = (entry for entry in entries if state_dict is not None and Path(entry.url).name == state_dict.name)
    entry = next(named, default)
    transforms = entry.transforms()
    height = width = transforms.crop_size[0]
    preprocessing = Preprocessing(3, height, width, tuple(transforms.mean), tuple(transforms.std))
    return Published(f"torchvision.models:{name}", entry.name, preprocessing, tuple(entry.meta["categories"]))


def look_up_timm(name: str, arguments: Mapping[str, object]) -> Published:
    """Look up a network of timm's; nothing is downloaded.

    Args:
        name: As `timm.create_model` takes it: `resnet50`, or with the tag of its weights, `resnet50.a1_in1k`.
        arguments: The constructor's keyword arguments, and `mean` and `std`, as `timm_preprocessing` takes them.

    Returns:
        What timm publishes of the weights that the tag names, or of timm's default ones. The classes are ImageNet's if
        the tag says that these weights were last trained for it.

    Raises:
        ArchiveError: timm is not installed, or has no such network or weights.
    """
    try:
        import timm
    except ModuleNotFoundError as err:
        raise ArchiveError("--timm needs the package timm: pip install timm") from err
    renamed = {old: new for old, new in timm.models.get_deprecated_models().items() if new}
    known = {*timm.list_models(), *timm.list_models(include_tags=True), *renamed}
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), 5, 0.6)
        advice = f"it has {', '.join(near)}" if near else "timm.list_models() lists what it has"
        raise ArchiveError(f"timm has no network {name!r}; {advice}")
    name = renamed.get(name, name)
    network, _, tag = name.partition(".")
    entry = timm.models.model_entrypoint(network)
    published: Any = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()  # With methods without types.
    facts = published.to_dict()
    outputs = arguments.get("num_classes", facts["num_classes"])
    is_imagenet = outputs == facts["num_classes"] == len(_IMAGENET) and "in1k" in str(facts.get("tag"))
    return Published(
        f"{entry.__module__}:{entry.__name__}",
        tag,
        timm_preprocessing(facts, arguments),
        _IMAGENET if is_imagenet else (),
        {"pretrained_cfg": tag} if tag else {},
    )


def timm_preprocessing(facts: Mapping[str, Any], arguments: Mapping[str, Any]) -> Preprocessing:
    """Return the size and the normalisation that timm publishes for a network's weights.

    Args:
        facts: Those of `timm.models.PretrainedCfg`.
        arguments: The constructor's; `in_chans` and `img_size` change what it takes. Also `mean` and `std`, in place of
            the published ones.
    """
    import timm.data

    data: Any = timm.data  # Without types.
    found = data.resolve_data_config(pretrained_cfg=facts)
    size = arguments.get("img_size") or found["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    channels = arguments.get("in_chans", found["input_size"][0])
    mean, std = (tuple(arguments.get(name) or found[name]) for name in ("mean", "std"))
    return Preprocessing(channels, height, width, mean, std)


def from_network(
    architecture: str,
    *,
    name: str,
    layers: Mapping[str, str] | str,
    preprocessing: Preprocessing,
    state_dict: Path | None = None,
    ema: bool = False,
    packages: Sequence[str] = (),
    seed: int | None = None,
    arguments: Mapping[str, object] | None = None,
    classes: Sequence[str] = (),
    version: str = "1.0",
    description: str = "",
    report: Callable[[str], None] = lambda _: None,
) -> Contents:
    """Take a network that `training.train` knows nothing of.

    Args:
        architecture: `path/to/net.py:Name`, `package.module:Name`, or a builder such as `torchvision.models:resnet18`.
        name: What the model is served under.
        layers: Public name → node of torchvision's feature extraction; `AUTO` for those that are proposed.
        preprocessing: What the network takes.
        state_dict: The weights' file: a state dict, alone or in a checkpoint, or safetensors, whole or in shards.
        ema: Take the moving average of the weights that the file holds beside them.
        packages: Installed ones that travel besides those that are found, as `find_named` takes them.
        seed: Without a file: initialise the network from this seed.
        arguments: The constructor's keyword arguments, plain JSON values.
        classes: Labels in the order of the outputs; none for a network whose output is no scores.
        version: The model's version.
        description: One sentence for the model card.
        report: Is told which weights of the file were taken, and what was left out.

    Raises:
        ArchiveError: The network cannot be built, the weights do not fit it, or no layers were asked for: the text then
            lists those there are and those proposed.
    """
    constructor = dict(arguments or {})
    fetching = [name for name in _FETCHING if constructor.get(name)]
    if fetching and re.match(r"(torchvision|timm)\b", architecture):
        raise ArchiveError(f"a server must not download weights: leave out `{fetching[0]}` and give --state-dict")
    logger.info("building %s", architecture)
    named = []
    for package in packages:
        modules = find_named(package)
        named += modules
        report("" if modules else f"not packed: {package}, which the serving image installs, in a version of its own")
    found = complete(find(architecture), constructor, noise(preprocessing), named)
    for line in describe(found):
        report(line)
    with found.importable(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        network = found.build(constructor)
        if state_dict is not None:
            logger.info("loading weights")
            report(load(network, state_dict, ema=ema))
        weights = packing.weights(network.state_dict())
        if not isinstance(layers, Mapping) or not layers:
            layers = _proposed(network.eval(), preprocessing, take=layers == AUTO)
    card = {
        "format": FORMAT,
        "model": name,
        "version": version,
        "description": description or f"{found.reference}, a network of the user's own.",
        "architecture": found.reference,
        "arguments": constructor,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "layers": dict(layers),
        "training": {},
    }
    return Contents(card, weights, found)


def _proposed(network: nn.Module, preprocessing: Preprocessing, *, take: bool) -> dict[str, str]:
    """Return the layers that are proposed, or raise them for the user to choose from."""
    logger.info("looking for layers")
    picture = noise(preprocessing)
    found = survey(network, picture)
    _, channels, height, width = picture.shape
    proposals = propose(network, found, (channels, height, width))
    if take and proposals:
        return {one.name: one.node for one in proposals if one.chosen}
    if not proposals:
        raise ArchiveError(f"no layers can be proposed; name some with --layers NAME=NODE\n{listing(found)}")
    chosen = ",".join(f"{one.name}={one.node}" for one in proposals if one.chosen)
    raise ArchiveError(
        f"say which layers to publish; nothing was written\n\n{listing(found)}\n\nproposed (stride: input pixels from "
        f"cell to cell; sees: input pixels that a cell answers to):\n{table(proposals)}\n\n"
        f"--layers {AUTO} publishes those marked *, which is the same as\n--layers {chosen}"
    )


def read_classes(path: Path) -> list[str]:
    """Read one label a line, in the order of the network's outputs.

    Raises:
        ArchiveError: The file cannot be read, is empty or has an empty line among its labels.
    """
    try:
        labels = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as err:
        raise ArchiveError(f"the classes cannot be read: {err}") from err
    if not labels or "" in labels:
        raise ArchiveError(f"{path} must hold one label a line and no empty line")
    return labels
