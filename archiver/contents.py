"""Contents: what an archive holds about one model, from a checkpoint, a user's network or another archive.

Contents become files only after they pass the tests: the network is built from what will be packed, its weights are
loaded strictly, and pictures are run, one at a time and together.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from archiver import packing
from archiver.architecture import Architecture, find
from archiver.description import describe
from archiver.older import renewed
from archiver.packing import ArchiveError
from archiver.proof import check_batch_independence, check_graph, check_rebuilt, why_no_gradients
from archiver.survey import Shape, batch_size, check_layers, check_scores, survey
from archiver.trial import noise
from archiver.weights import load_file, load_strictly
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import (
    CARD,
    DESCRIBED,
    FORMAT,
    GRAPH,
    KIND,
    LAYOUTS,
    NO_GRADIENTS,
    OUTPUT_NAME,
    PROBABILITIES,
    REFERENCE,
    VALUE,
    WEIGHTS,
    eager_arguments,
)
from handlers.network.engines.reference import TOLERANCE, compare
from handlers.network.engines.torch_engine import TorchEngine

logger = logging.getLogger(__name__)

_REPEATED = TOLERANCE / 10  # Largest difference between a kept reference and what the network computes here.

_CHECKPOINT_KEYS = (
    "model",
    "description",
    "architecture",
    "arguments",
    "classes",
    "preprocessing",
    "layers",
    "state_dict",
    "training",
)
_TRAINING_KEYS = (
    "data",
    "train_pictures",
    "test_pictures",
    "epochs",
    "seed",
    "train_accuracy",
    "test_accuracy",
    "seconds",
    "machine",
    "versions",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_LAYER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_RESERVED_NAMES = ("all", "none", "index", "label", "probability", "logit", "reply", "file", "allow_pickle")
_RESERVED_ENDS = (".scale", ".offset", ".channels", ".npy")  # Layers are members of an npz; so are these.


class Proof(NamedTuple):
    """Results of testing a model.

    Attributes:
        shapes: (C, h, w) of every published layer, by public name.
        no_gradients: Why the scores have no gradients; empty if they have gradients, or if there are no scores.
        described: The other facts about the model for the card.
        reference: The tensors of reference.safetensors.
    """

    shapes: dict[str, Shape]
    no_gradients: str
    described: dict[str, Any]
    reference: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Contents:
    """One model, ready to be tested and packed.

    Attributes:
        card: The content of card.json.
        weights: The content of weights.safetensors.
        architecture: The constructor, with the sources that travel.
        graph: The content of graph.onnx; None without a graph. The card holds its origin under `graph`.
        reference: The content of reference.safetensors in the archive that the contents were read from; None without.
    """

    card: Mapping[str, Any]
    weights: bytes
    architecture: Architecture
    graph: bytes | None = None
    reference: bytes | None = None

    def files(self) -> dict[str, bytes]:
        """Return every file of the archive, after testing the model.

        Raises:
            ArchiveError: The model fails a test; the message says why.
        """
        proof = self.prove()
        batch = batch_size(proof.shapes, any_size=self.preprocessing.size is None)
        card = {name: value for name, value in self.card.items() if name not in (NO_GRADIENTS, DESCRIBED)}
        if proof.no_gradients:
            card[NO_GRADIENTS] = proof.no_gradients
        card[DESCRIBED] = proof.described
        graph = {} if self.graph is None else {GRAPH: self.graph}
        return {
            **packing.handler_files(),
            **self.architecture.sources,
            packing.MANIFEST: packing.manifest(self.card["model"], self.card["version"]),
            CARD: packing.to_json(card),
            packing.CONFIG: packing.model_config(batch),
            WEIGHTS: self.weights,
            REFERENCE: self._keep_reference(proof.reference),
            **graph,
        }

    def _keep_reference(self, fresh: dict[str, NDArray[Any]]) -> bytes:
        """Return the reference of the archive that the contents were read from, where the network still computes it.

        Another machine sums in another order, so the last digits differ.
        """
        if self.reference is not None:
            try:
                kept = safetensors.numpy.load(self.reference)
                if kept.keys() == fresh.keys():
                    compare(fresh, kept, _REPEATED)
                    return self.reference
            except (RuntimeError, SafetensorError) as err:
                logger.info("the reference is new: %s", err)
        return safetensors.numpy.save(fresh)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the network's input."""
        return Preprocessing.from_dict(self.card["preprocessing"])

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """Build the network from what will be packed; use it inside the context: its own imports fail outside.

        Raises:
            ArchiveError: The network cannot be built, or the weights do not fit.
        """
        with self.architecture.importable(), torch.random.fork_rng(devices=[]):
            network = self.architecture.build(self.card["arguments"])
            load_strictly(network, packing.read_weights(self.weights))
            yield network.eval()

    def with_graph(self, content: bytes | None, origin: Mapping[str, Any] | None = None) -> Contents:
        """Return the same model with another graph, or without a graph.

        Args:
            content: The content of graph.onnx.
            origin: The card's entry about the graph.
        """
        card = {name: value for name, value in self.card.items() if name != "graph"}
        found = replace(self, card=card if origin is None else {**card, "graph": origin}, graph=content)
        if "_proof" in vars(self):  # The proof is about the network; another graph does not change it.
            vars(found)["_proof"] = self._proof
        return found

    def prove(self) -> Proof:
        """Build the network from what will be packed and run pictures of noise; cached, since contents cannot change.

        Raises:
            ArchiveError: The network cannot be built, the weights do not fit, layers, classes or graph do not match the
                network, or its output for a picture depends on more than the picture.
        """
        proof = self._proof
        _ = self._graph_proof
        return proof

    @cached_property
    def _graph_proof(self) -> None:
        if self.graph is not None:
            logger.info("comparing with ONNX Runtime")
            with self.network() as network:
                check_graph(self.graph, self.weights, self.card, network, self.preprocessing)

    @cached_property
    def _proof(self) -> Proof:
        logger.info("testing the network")
        check_names(self.card)
        with self.network() as network:
            picture = noise(self.preprocessing)
            found = survey(network, picture)
            shapes = check_layers(found, self.card["layers"], self.card.get(LAYOUTS))
            check_scores(
                found,
                len(self.card["classes"]),
                self.card.get(KIND),
                self.card.get(OUTPUT_NAME, ""),
                gives_probabilities=bool(self.card.get(PROBABILITIES)),
                more=lambda: _more_answers(network, self.preprocessing),
            )
            try:
                eager = TorchEngine(network, **eager_arguments(self.card))
            except ValueError as err:  # The graph does not show how the tensor is returned.
                raise ArchiveError(f"{err}; return a dictionary or a tuple of tensors") from err
            check_batch_independence(eager, self.preprocessing)
            no_gradients = why_no_gradients(eager, self.preprocessing) if eager.has_scores else ""
            with self.network() as again:  # Inside the first context, so it draws other random numbers.
                check_rebuilt(again, picture, found.output)
            described, reference = describe(
                eager,
                self.preprocessing,
                len(self.card["classes"]),
                stored=packing.read_weights(self.weights),
                has_gradients=not no_gradients,
            )
        return Proof(shapes, no_gradients, described, reference)


def _more_answers(network: nn.Module, preprocessing: Preprocessing) -> Iterator[Any]:
    """Run more pictures of noise, one with such contrast that its logits leave the ordinary range."""
    first, *others = torch.split(noise(preprocessing, 3), 1)
    with torch.no_grad():
        for picture in (30 * first, *others):
            yield network(picture)


def from_checkpoint(path: Path, version: str, *, half: bool = False) -> Contents:
    """Read a checkpoint of `training.train`.

    Args:
        path: The checkpoint.
        version: The model's version.
        half: Keep the weights as float16.

    Raises:
        ArchiveError: `path` is not a checkpoint of format 1.
    """
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ArchiveError(f"{path} is no checkpoint of training.train; a plain state dict goes with --arch")
    missing = [key for key in _CHECKPOINT_KEYS if key not in checkpoint]
    if missing:
        raise ArchiveError(f"{path} is an incomplete checkpoint: it has no {', '.join(missing)}")
    training = {key: checkpoint["training"][key] for key in _TRAINING_KEYS if key in checkpoint["training"]}
    card = {
        "format": FORMAT,
        "model": checkpoint["model"],
        "version": version,
        "description": checkpoint["description"],
        "architecture": checkpoint["architecture"],
        "arguments": dict(checkpoint["arguments"]),
        "classes": list(checkpoint["classes"]),
        "preprocessing": dict(checkpoint["preprocessing"]),
        "layers": dict(checkpoint["layers"]),
        "training": training,
    }
    state = packing.halved(checkpoint["state_dict"]) if half else checkpoint["state_dict"]
    return Contents(card, packing.weights(state), find(checkpoint["architecture"]))


def from_files(files: Mapping[str, bytes]) -> Contents:
    """Read the contents of an archive without its code; an older format is converted to today's.

    Raises:
        ArchiveError: The files are not those of a convscope archive.
    """
    files = renewed(files)
    missing = [name for name in (CARD, WEIGHTS) if name not in files]
    if missing:
        raise ArchiveError(f"it holds no {' and no '.join(missing)}; it is not one of our archives")
    card = json.loads(files[CARD])
    if card.get("format") != FORMAT:
        raise ArchiveError(f"its card.json has format {card.get('format')!r}, not {FORMAT}")
    sources = {name: content for name, content in files.items() if not packing.is_ours(name)}
    if ("graph" in card) != (GRAPH in files):
        raise ArchiveError(f"its card.json and its files disagree on whether there is a {GRAPH}")
    architecture = Architecture(card["architecture"], sources)
    return Contents(card, files[WEIGHTS], architecture, files.get(GRAPH), files.get(REFERENCE))


def check_names(card: Mapping[str, Any]) -> None:
    """Check the names that become part of a URL, a file name or a header.

    Raises:
        ArchiveError: The model, its version or a layer has a name that is not valid there.
    """
    for what, pattern in (("model", _NAME), ("version", _VERSION)):
        if not pattern.fullmatch(card[what]):
            raise ArchiveError(
                f"{card[what][:120]!r} cannot be a {what}: it becomes part of a URL; use letters, digits, - _, "
                "at most 100 of them"
            )
    for layer in card["layers"]:
        if not _LAYER.fullmatch(layer):
            raise ArchiveError(
                f"{layer[:120]!r} cannot be a layer's public name; use at most 100 letters, digits, - _ ."
            )
        reserved = (*_RESERVED_NAMES, "value") if card.get(KIND) == VALUE else _RESERVED_NAMES
        if layer in reserved or layer.endswith(_RESERVED_ENDS):
            raise ArchiveError(
                f"{layer!r} cannot be a layer's public name: requests or replies have a word of their own for it; not "
                f"{', '.join(reserved)}, and nothing that ends in {', '.join(_RESERVED_ENDS)}"
            )
