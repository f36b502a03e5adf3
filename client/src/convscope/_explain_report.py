"""What the command line says of explanations and of patches, as text and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope._pictures import encode_pictures
from convscope._report import free_folder
from convscope._table import format_table, printable
from convscope._tiles import encode_png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope._client import Client
    from convscope._explanation import Explanation
    from convscope._patches import Patch

Found = list[tuple[str, "Patch"]]
"""Patches, the strongest cell first, each with the name of its picture."""


@dataclass(frozen=True)
class Row:
    """What became of one picture.

    Attributes:
        picture: Its path as given; of a file of several pictures with [its number].
        explanation: None if there is none.
        error: Why there is none, (code, message).
        saved: Where it was written, if anywhere.
    """

    picture: str
    explanation: Explanation | None
    error: tuple[str, str] | None
    saved: Path | None = None


def explain_pictures(client: Client, paths: Sequence[str], *, save: str | None, **options: Any) -> list[Row]:
    """Ask about pictures in one request; one that fails does not fail the others.

    Args:
        client: Whom to ask.
        paths: Picture files.
        save: Directory to write each picture's explanation below; None for not.
        **options: As for `Client.explain`.

    Returns:
        A row for each picture, in order.

    Raises:
        ConvscopeError: The request as a whole failed.
        OSError: A picture cannot be read, or an explanation not written.
        ValueError: An option is out of range.
    """
    names, files = _read(paths)
    rows: list[Row] = []
    folders: set[Path] = set()
    for name, explanation in zip(names, client.explain(files, **options), strict=True):
        if explanation.error is not None:
            rows.append(Row(name, None, (explanation.error.code, explanation.error.message)))
            continue
        saved = None if save is None else explanation.save(free_folder(Path(save), name, folders))
        rows.append(Row(name, explanation, None, saved))
    return rows


def _read(paths: Sequence[str]) -> tuple[list[str], list[bytes]]:
    """Read picture files; one of several pictures becomes several, named with [their numbers]."""
    files: list[bytes] = []
    names: list[str] = []
    for path in paths:
        found = encode_pictures(path).files
        names += [path] if len(found) == 1 else [f"{path}[{number}]" for number in range(len(found))]
        files += found
    return names, files


def explanations_text(rows: Sequence[Row]) -> str:
    """Return explanations as a table: which class, how, and where the strongest place is."""
    cells: list[list[str]] = []
    for row in rows:
        if row.explanation is None:
            code, message = row.error or ("", "")
            cells.append([row.picture, f"{code}: {message}"])
            continue
        said = _said(row.explanation)
        at = "{}, {} of {} × {}".format(*said["strongest"], *said["shape"][1:])
        shown = (said["label"], said["target"], said["method"], said["layer"] or "", at)
        cells.append([row.picture, *map(str, shown), f"{said['least']:.4g}", f"{said['most']:.4g}"])
    header = ["picture", "class", "index", "method", "layer", "strongest at", "least", "most"]
    saved = [f"saved {printable(str(row.saved))}" for row in rows if row.saved is not None]
    return "\n\n".join([format_table(header, cells, right=(2, 6, 7)), *(["\n".join(saved)] if saved else [])])


def explanations_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Return explanations for programs; the heat itself is for `--save`."""
    return {
        "results": [
            {"picture": row.picture, "error": dict(zip(("code", "message"), row.error or ("", ""), strict=True))}
            if row.explanation is None
            else {"picture": row.picture, **_said(row.explanation), "saved": row.saved and str(row.saved)}
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


def find_strongest(client: Client, paths: Sequence[str], **options: Any) -> Found:
    """Look for a channel's strongest cells in picture files.

    Args:
        client: Whom to ask.
        paths: Picture files.
        **options: As for `Client.strongest`.

    Returns:
        Patches with the names of their pictures.

    Raises:
        ConvscopeError: A picture failed, or a request did.
        OSError: A picture cannot be read.
        ValueError: As `Client.strongest`.
    """
    names, files = _read(paths)
    return [(names[patch.picture], patch) for patch in client.strongest(files, **options)]


def save_patches(found: Found, directory: str) -> list[Path]:
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
    files = [folder / f"{rank:03}.png" for rank in range(1, len(found) + 1)]
    for file, (_, patch) in zip(files, found, strict=True):
        image = patch.image()
        file.write_bytes(encode_png(image if image.shape[2] in (1, 3) else image[:, :, :1]))
    return files


def patches_text(found: Found, saved: Sequence[Path]) -> str:
    """Return patches as a table."""
    rows = []
    for rank, (name, patch) in enumerate(found, 1):
        top, left, bottom, right = patch.box
        place = [f"{patch.cell[0]}, {patch.cell[1]}", f"{top} to {bottom - 1}, {left} to {right - 1}"]
        rows.append([str(rank), f"{patch.value:.4g}", name, *place])
    text = format_table(["rank", "value", "picture", "cell", "pixels (rows, columns)"], rows, right=(0, 1))
    return f"{text}\n\nsaved {printable(str(saved[0].parent))}" if saved else text


def patches_json(found: Found, saved: Sequence[Path]) -> dict[str, Any]:
    """Return patches for programs, without their pixels."""
    patches = []
    for rank, (name, patch) in enumerate(found):
        values = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
        del values["pixels"]
        patches.append(values | {"picture": name, "saved": str(saved[rank]) if saved else None})
    return {"patches": patches}
