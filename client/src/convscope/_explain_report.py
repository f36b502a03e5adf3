"""What the command line says of explanations and of patches, as text and as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convscope._cli_pictures import Failure, read, refuse_existing
from convscope._strongest import strongest_cells
from convscope._table import format_table, printable
from convscope._tiles import encode_png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope._cli_pictures import Row
    from convscope._client import Client
    from convscope._exceptions import ConvscopeError
    from convscope._explanation import Explanation
    from convscope._patches import Patch


class Strongest(NamedTuple):
    """What a channel answers to.

    Attributes:
        patches: The strongest cell first, each with the name of its picture.
        failed: The pictures that were not looked through, and why.
    """

    patches: list[tuple[str, Patch]]
    failed: list[tuple[str, Failure]]


def explanations_text(rows: Sequence[Row[Explanation]]) -> str:
    """Return explanations as a table: which class, how, and where the strongest place is."""
    cells: list[list[str]] = []
    for row in rows:
        if row.error is not None or row.found is None:
            cells.append([row.picture, str(row.error)])
            continue
        said = _said(row.found)
        at = "{}, {} of {} × {}".format(*said["strongest"], *said["shape"][1:])
        shown = (said["label"], said["target"], said["method"], said["layer"] or "", at)
        cells.append([row.picture, *map(str, shown), f"{said['least']:.4g}", f"{said['most']:.4g}"])
    header = ["picture", "class", "index", "method", "layer", "strongest at", "least", "most"]
    saved = [f"saved {printable(str(row.saved))}" for row in rows if row.saved is not None]
    return "\n\n".join([format_table(header, cells, right=(2, 6, 7)), *(["\n".join(saved)] if saved else [])])


def explanations_json(rows: Sequence[Row[Explanation]]) -> dict[str, Any]:
    """Return explanations for programs; the heat itself is for `--save`."""
    return {
        "results": [
            {"picture": row.picture, "error": row.error and row.error._asdict()}
            if row.error is not None or row.found is None
            else {"picture": row.picture, **_said(row.found), "saved": row.saved and str(row.saved)}
            for row in rows
        ]
    }


def _said(explanation: Explanation) -> dict[str, Any]:
    """Sum an explanation up. The strongest place is (row, column) of the heat, its channels added up."""
    heat = explanation.heat.sum(axis=0)
    return {
        "label": explanation.label,
        "target": explanation.target,
        "method": explanation.method,
        "layer": explanation.layer or None,
        "shape": list(explanation.heat.shape),
        "strongest": [int(place) for place in np.unravel_index(heat.argmax(), heat.shape)],
        "least": float(heat.min()),
        "most": float(heat.max()),
        "delta": explanation.delta,
    }


def find_strongest(client: Client, paths: Sequence[str], *, save: str | None, **options: Any) -> Strongest:
    """Look for a channel's strongest cells in picture files; one that fails does not fail the others.

    Args:
        client: Whom to ask.
        paths: Picture files.
        save: Directory in which `save_patches` is to write; None for none.
        **options: As for `Client.strongest`.

    Returns:
        Patches with the names of their pictures, and the pictures that failed.

    Raises:
        ConvscopeError: A request as a whole failed.
        FileExistsError: The directory exists. Nothing was asked then.
        ValueError: As `Client.strongest`.
    """
    if save is not None:
        refuse_existing(Path(save))
    pictures = read(paths)
    names = [name for name, file in pictures if isinstance(file, bytes)]
    files = [file for _, file in pictures if isinstance(file, bytes)]
    refused: dict[int, ConvscopeError] = {}
    patches = strongest_cells(client, files, deadline_s=None, rejected=refused, **options)
    failed = [(name, file) for name, file in pictures if isinstance(file, Failure)]
    failed += [(names[number], Failure(error.code, error.message)) for number, error in refused.items()]
    return Strongest([(names[patch.picture], patch) for patch in patches], failed)


def save_patches(found: Strongest, directory: str) -> list[Path]:
    """Write each patch as a PNG into a new directory, named by its rank.

    Args:
        found: The patches.
        directory: Must not exist.

    Returns:
        The files.

    Raises:
        FileExistsError: The directory exists.
        OSError: It cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True)
    files = [folder / f"{rank:03}.png" for rank in range(1, len(found.patches) + 1)]
    for file, (_, patch) in zip(files, found.patches, strict=True):
        image = patch.image()
        file.write_bytes(encode_png(image if image.shape[2] in (1, 3) else image[:, :, :1]))
    return files


def patches_text(found: Strongest, saved: Sequence[Path]) -> str:
    """Return patches as a table, and below them the pictures that failed."""
    rows = []
    for rank, (name, patch) in enumerate(found.patches, 1):
        top, left, bottom, right = patch.box
        place = [f"{patch.cell[0]}, {patch.cell[1]}", f"{top} to {bottom - 1}, {left} to {right - 1}"]
        rows.append([str(rank), f"{patch.value:.4g}", name, *place])
    rows += [["–", "–", name, str(error)] for name, error in found.failed]
    text = format_table(["rank", "value", "picture", "cell", "pixels (rows, columns)"], rows, right=(0, 1))
    return f"{text}\n\nsaved {printable(str(saved[0].parent))}" if saved else text


def patches_json(found: Strongest, saved: Sequence[Path]) -> dict[str, Any]:
    """Return patches for programs, without their pixels, and the pictures that failed."""
    patches = []
    for rank, (name, patch) in enumerate(found.patches):
        values = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
        del values["pixels"]
        patches.append(values | {"picture": name, "saved": str(saved[rank]) if saved else None})
    failed = [{"picture": name, "error": error._asdict()} for name, error in found.failed]
    return {"patches": patches, "failed": failed}
