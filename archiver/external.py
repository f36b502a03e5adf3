"""External networks: a user's own, torchvision's or timm's, from constructor, weights and layers to an archive.

Nothing is downloaded: the facts about published weights come with the package, the weights themselves from a file.
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
from archiver.contents import Contents
from archiver.layouts import Layouts, extra_tokens_layout
from archiver.packages import complete, describe, find_named
from archiver.packing import ArchiveError
from archiver.proof import gives_probabilities
from archiver.proposal import propose, table
from archiver.recipes import find_timm, of_torchvision, timm_preprocessing
from archiver.survey import listing, survey
from archiver.trial import noise
from archiver.weights import load
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import (
    FORMAT,
    KIND,
    LAYOUTS,
    NONE,
    OUTPUT_NAME,
    PROBABILITIES,
    SCORES,
    SIGMOID,
    SOFTMAX,
)
from handlers.network.layouts import parse

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Instead of layers: those that `propose` chooses."""

_IMAGENET = tuple(models.ResNet18_Weights.DEFAULT.meta["categories"])
_FETCHING = ("weights", "weights_backbone", "pretrained", "checkpoint_path")  # Arguments of torchvision and timm.


_TRANSFORMING = ("googlenet", "inception_v3")  # torchvision's builders set `transform_input` for published weights.


@dataclass(frozen=True)
class Published:
    """A network of torchvision or timm and one set of its weights.

    Attributes:
        architecture: The builder, as `--arch` takes it.
        weights: The name of the set of weights, such as `IMAGENET1K_V1`.
        preprocessing: The published recipe: how a picture is resized, cropped and normalised.
        classes: Labels in the order of the outputs; empty if the meaning of the outputs is not published.
        arguments: Keyword arguments of the builder that belong to the name.
        is_guess: Whether the name of the weights file is none under which the library publishes weights of the network,
            so that the file may hold other weights, with another recipe or other classes.
    """

    architecture: str
    weights: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    arguments: Mapping[str, object] = field(default_factory=dict)
    is_guess: bool = False


def look_up_torchvision(
    name: str, state_dict: Path | None = None, arguments: Mapping[str, object] | None = None
) -> Published:
    """Look up a torchvision classifier.

    Args:
        name: torchvision's name, such as `resnet18`.
        state_dict: A weights file; if it still has its published name, the facts are those of these weights, else those
            of torchvision's default weights.
        arguments: The constructor's keyword arguments.

    Returns:
        The facts that torchvision publishes, with the arguments that its builder adds for its own weights.

    Raises:
        ArchiveError: torchvision has no such classifier, or an argument that a weights file does not show is missing.
    """
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        raise ArchiveError(f"torchvision has no classifier {name!r}; it has {', '.join(near or known)}")
    entries = list(models.get_model_weights(name))
    default = models.get_model_weights(name).DEFAULT
    named = [entry for entry in entries if state_dict is not None and Path(entry.url).name == state_dict.name]
    entry = named[0] if named else default
    own: dict[str, object] = {}
    if name in _TRANSFORMING and named:
        own = {"transform_input": True}
    elif name in _TRANSFORMING and state_dict is not None and "transform_input" not in (arguments or {}):
        raise ArchiveError(
            f"{name} may normalise pictures once more in the network, which {state_dict.name} does not show: add "
            '"transform_input": true to --arguments if its training began with torchvision\'s weights, else false'
        )
    elif named and name.startswith("vit_"):  # The picture size sets its grid of patches.
        own = {"image_size": entry.transforms().crop_size[0]}
    facts = [(of_torchvision(one.transforms()), tuple(one.meta["categories"])) for one in (entry, *entries)]
    is_guess = state_dict is not None and not named and len(set(facts)) > 1
    return Published(f"torchvision.models:{name}", entry.name, *facts[0], own, is_guess)


def look_up_timm(name: str, arguments: Mapping[str, object]) -> Published:
    """Look up a timm network; nothing is downloaded.

    Args:
        name: As `timm.create_model` takes it: `resnet50`, or with the tag of its weights, `resnet50.a1_in1k`.
        arguments: The constructor's keyword arguments, and `mean` and `std`, as `timm_preprocessing` takes them.

    Returns:
        The facts that timm publishes about the weights that the tag names, or about its default weights. The classes
        are ImageNet's if the tag says that these weights were last trained on ImageNet.

    Raises:
        ArchiveError: timm is not installed, or has no such network or weights.
    """
    name = find_timm(name)
    import timm

    network, _, tag = name.partition(".")
    entry = timm.models.model_entrypoint(network)
    published: Any = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()  # Its methods have no types.
    facts = published.to_dict()
    own = {"pretrained_cfg": tag} if tag else {}
    outputs = arguments.get("num_classes", facts["num_classes"])
    is_imagenet = outputs == facts["num_classes"] == len(_IMAGENET) and "in1k" in str(facts.get("tag"))
    return Published(
        f"{entry.__module__}:{entry.__name__}",
        tag,
        timm_preprocessing(network, {**arguments, **own}),
        _IMAGENET if is_imagenet else (),
        own,
    )


def from_network(
    architecture: str,
    *,
    name: str,
    layers: Mapping[str, str] | str,
    preprocessing: Preprocessing,
    state_dict: Path | None,
    ema: bool,
    packages: Sequence[str],
    seed: int | None,
    arguments: Mapping[str, object],
    classes: Sequence[str],
    scores: str | None,
    probabilities: bool | None,
    output: str,
    tokens: str,
    version: str,
    description: str,
    report: Callable[[str], None],
) -> Contents:
    """Make the contents of a network that `training.train` does not know.

    Args:
        architecture: `path/to/net.py:Name`, `package.module:Name`, or a builder such as `torchvision.models:resnet18`.
        name: Name that the model is served under.
        layers: Public name → node of torchvision's feature extraction, or `output:` and the name of a tensor that the
            network returns; followed by `@` and a layout if it cannot be found out. `AUTO` for the proposed layers.
        preprocessing: What the network takes.
        state_dict: The weights file: a state dict, alone or in a checkpoint, or safetensors, whole or in shards.
        ema: Take the moving average of the weights, if the file holds it too.
        packages: Installed packages to pack besides those that are found, as `find_named` takes them.
        seed: Seed of the initial weights, without a weights file.
        arguments: The constructor's keyword arguments, plain JSON values.
        classes: Labels in the order of the outputs; empty for a network whose output is not scores.
        scores: Meaning of the outputs, one of `SCORES`; None for softmax, or for none without classes.
        probabilities: Whether the outputs are probabilities already; None to find out.
        output: Which of several returned tensors is the scores: keys or indexes separated by dots.
        tokens: The grid of patches, `14x14+1` for 14×14 after one other token; empty to find out.
        version: The model's version.
        description: One sentence for the model card; empty for a default that names the network's origin.
        report: Called with a line on which weights of the file were taken and which were left out.

    Raises:
        ArchiveError: The network cannot be built, the weights do not fit, or no layers were requested: the message then
            lists the available and the proposed layers.
    """
    constructor = dict(arguments)
    fetching = [name for name in _FETCHING if constructor.get(name)]
    if fetching and re.match(r"(torchvision|timm)\b", architecture):
        raise ArchiveError(f"a server must not download weights: leave out `{fetching[0]}` and give --state-dict")
    logger.info("building %s", architecture)
    named = []
    for package in packages:
        modules = find_named(package)
        named += modules
        if not modules:
            report(f"not packed: {package}, which the serving image installs, in a version of its own")
    found = complete(find(architecture), constructor, noise(preprocessing), named)
    for line in describe(found):
        report(line)
    with found.importable(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        network = found.build(constructor)
        if state_dict is not None:
            logger.info("loading weights")
            if taken := load(network, state_dict, ema=ema):
                report(taken)
        weights = packing.weights(network.state_dict())
        meaning = _meaning(network.eval(), preprocessing, classes, scores, output, probabilities)
        finder = Layouts(network, preprocessing, tokens)
        if isinstance(layers, Mapping) and layers:
            layers, layouts = _laid_out(layers, finder)
        else:
            layers, layouts = _proposed(network, preprocessing, finder, take=layers == AUTO)
    library = re.split(r"[.:]", found.reference)[0]
    owner = f"{library}'s" if library in ("torchvision", "timm") else "the user's own"
    card = {
        "format": FORMAT,
        "model": name,
        "version": version,
        "description": description or f"{found.reference}, a network of {owner}.",
        "architecture": found.reference,
        "arguments": constructor,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "layers": dict(layers),
        "training": {},
        **meaning,
        **({LAYOUTS: layouts} if layouts else {}),
    }
    return Contents(card, weights, found)


def _meaning(
    network: nn.Module,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    scores: str | None,
    output: str,
    probabilities: bool | None,
) -> dict[str, Any]:
    """Return the card's entries about the outputs: the options given, and what follows from them.

    Raises:
        ArchiveError: The options contradict each other, or do not say whether the outputs are probabilities.
    """
    if scores not in (None, *SCORES):
        raise ArchiveError(f"scores are {scores!r}; there are {', '.join(SCORES)}")
    if scores == NONE and (classes or output or probabilities is not None):
        given = {"--classes": classes, "--output": output, "--probabilities": probabilities is not None}
        raise ArchiveError(
            "--scores none cannot be combined with --classes, --output or --probabilities: leave out "
            + " and ".join(option for option, value in given.items() if value)
        )
    if not classes and (scores not in (None, NONE) or output or probabilities is not None):
        raise ArchiveError(
            "scores need names: --classes FILE, one label a line; for numbers, what they are and their unit"
        )
    if probabilities is not None and scores not in (SOFTMAX, SIGMOID):
        raise ArchiveError("say which probabilities they are: --scores softmax or --scores sigmoid")
    said = {} if scores is None else {KIND: scores}
    if output:
        said[OUTPUT_NAME] = output
    if probabilities is None and scores in (SOFTMAX, SIGMOID):
        probabilities = gives_probabilities(network, noise(preprocessing, 3), output, scores)
    return {**said, PROBABILITIES: True} if probabilities else said


def _laid_out(layers: Mapping[str, str], finder: Layouts) -> tuple[dict[str, str], dict[str, str]]:
    """Return the named layers without their layouts, and the layouts other than the usual one.

    Raises:
        ArchiveError: A layout cannot be found, or is not the one that was given.
    """
    nodes: dict[str, str] = {}
    said: dict[str, str] = {}
    for name, text in layers.items():
        nodes[name], at, word = text.partition("@")
        if at:
            said[name] = "" if word == "channels_first" else word
    try:
        found, unfit = finder.find(dict.fromkeys(nodes.values()))
    except Exception:  # No such node, or the network fails: the test of the contents reports it.
        return nodes, {name: word for name, word in said.items() if word}
    published: dict[str, str] = {}
    layouts: dict[str, str] = {}
    for name, node in nodes.items():
        if name in said:
            finder.check_size(parse(said[name]))
        elif node in unfit and len(finder.shapes[node]) in (2, 3):
            raise ArchiveError(
                f"layer {name!r}: {node!r} is ({', '.join(map(str, ('N', *finder.shapes[node])))}): {unfit[node]}"
            )
        _add(published, layouts, name, node, said.get(name, found.get(node, "")))
        beside = extra_tokens_layout(found.get(node, ""), finder.shapes[node])
        if beside and name not in said:
            _add(published, layouts, f"{name}.extra", node, beside)
    return published, layouts


def _add(layers: dict[str, str], layouts: dict[str, str], name: str, node: str, layout: str) -> None:
    layers[name] = node
    if layout:
        layouts[name] = layout


def _proposed(
    network: nn.Module, preprocessing: Preprocessing, finder: Layouts, *, take: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the proposed layers and their layouts, or raise an error that lists them for the user to choose from."""
    logger.info("looking for layers")
    picture = noise(preprocessing)
    found = survey(network, picture)
    found.layouts, _ = finder.find(node for node in found.node_shapes if node not in found.overwritten)
    _, channels, height, width = picture.shape
    proposals = propose(network, found, (channels, height, width))
    if take and proposals:
        layers: dict[str, str] = {}
        layouts: dict[str, str] = {}
        for one in proposals:
            if one.chosen:
                layout = found.layouts[one.node]
                _add(layers, layouts, one.name, one.node, layout)
                beside = extra_tokens_layout(layout, found.node_shapes[one.node])
                if beside:
                    _add(layers, layouts, f"{one.name}.extra", one.node, beside)
        return layers, layouts
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
