"""Engines: whether an archive holds a graph for ONNX Runtime beside what torch needs, which is always there."""

from __future__ import annotations

from dataclasses import replace

from archiver.contents import Contents
from archiver.graph import export, missing_packages
from archiver.packing import ArchiveError
from handlers.images.preprocessing import noise

ENGINES = ("auto", "torch", "onnx")


def with_engine(contents: Contents, engine: str) -> tuple[Contents, str]:
    """Add the graph, or leave it out.

    Args:
        contents: The model.
        engine: One of `ENGINES`: `torch` for no graph; `onnx` for one; `auto` for one if that can be done here.

    Returns:
        The contents, and for people what they can be served by.

    Raises:
        ArchiveError: `onnx` cannot be had.
    """
    if engine == "torch":
        return _without(contents), "torch"
    try:
        found = _exported(contents)
    except ArchiveError as err:
        if engine == "onnx":
            raise
        return _without(contents), f"torch alone: {err}"
    return found, f"ONNX Runtime where it is installed (a graph of {len(found.graph or b''):,} bytes), else torch"


def _exported(contents: Contents) -> Contents:
    missing = missing_packages()
    if missing:
        raise ArchiveError(f"a graph for ONNX Runtime needs {', '.join(missing)}, not installed here")
    contents.prove()  # What is wrong with the model itself is said before the exporter says it in its own way.
    with contents.network() as network:
        for part in network.modules():  # As the handler does: a map must not change after it was taken.
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]
        graph = export(
            network,
            contents.card["layers"],
            noise(contents.preprocessing),
            has_scores=bool(contents.card["classes"]),
            any_size=contents.preprocessing.size is None,
        )
    origin = {"weights": list(graph.weights), "versions": dict(graph.versions)}
    found = replace(contents, card={**contents.card, "graph": origin}, graph=graph.content)
    found.prove()
    return found


def _without(contents: Contents) -> Contents:
    card = {name: value for name, value in contents.card.items() if name != "graph"}
    return replace(contents, card=card, graph=None)
