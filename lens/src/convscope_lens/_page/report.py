"""Builds reports: self-contained HTML files with the scores, maps and heat map of a picture, and an index of many."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convscope import ConvscopeError
from convscope.commands import STANDARD_INPUT, raise_if_of_service

from convscope_lens._page.html import page_html
from convscope_lens._page.page_data import encode_one_picture, fetch_page_data, thumbnail

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from convscope import Client, ModelCard
    from convscope.typing import Method, Picture

MAX_MAP_VALUES = 1_200_000  # All maps together; as base64 they are 1.6 MB of the file.


def report(
    client: Client,
    picture: Picture,
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    method: Method | None = "grad_cam",
    layer: str | None = None,
    target: int | None = None,
    top_k: int = 5,
    title: str | None = None,
    request_id: str | None = None,
) -> str:
    """Predict and explain a picture, and return the result as one HTML page.

    Args:
        client: An open client; makes three requests (card, explain, predict), and one more for each layer whose
            kernels are shown.
        picture: One picture, as in `Client.predict`.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Layers to show: names, one name, or `"all"`. If the maps are too large for a page, it shows the
            strongest channels of each layer.
        method: Method of the heat map, as in `Client.explain`; None for none. If the model does not support Grad-CAM,
            the default, the page has no heat map and says why. With an explicit `method`, `layer` or `target` the error
            is raised.
        layer: Layer that `grad_cam` and `cam` use; None for the last one with more than one row and column.
        target: Index of the class to explain; None for the most probable one.
        top_k: Number of scores; 0 for all.
        title: Title of the picture; None for its file name.
        request_id: Id of the request for scores and maps, as in `Client.predict`.

    Returns:
        A self-contained HTML document.

    Raises:
        ConvscopeError: A request failed.
        OSError: A path cannot be read.
        TypeError: The argument is not a picture.
        ValueError: An array or an option is out of range, or there are several pictures.
    """
    file = encode_one_picture(picture)
    if title is None:
        title = file_name(picture) if isinstance(picture, str | os.PathLike) else "picture"
    options = Options(version, layers if isinstance(layers, str) else list(layers), method, layer, target, top_k)
    card = client.model_card(model, version)
    return _page(client, file, card, model, title, options, request_id)[0]


class Options(NamedTuple):
    """Arguments of `report` that all reports of a command share."""

    version: str | None = None
    layers: str | list[str] = "all"
    method: Method | None = "grad_cam"
    layer: str | None = None
    target: int | None = None
    top_k: int = 5


def _page(
    client: Client,
    file: bytes,
    card: ModelCard,
    model: str,
    title: str,
    options: Options,
    request_id: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Return a report, and the data it shows."""
    data = fetch_page_data(
        client,
        file,
        card,
        model=model,
        title=title,
        max_values=MAX_MAP_VALUES,
        by_default=options.method == "grad_cam" and options.target is None and options.layer is None,
        kernels=True,
        request_id=request_id,
        **options._asdict(),
    )
    return page_html(f"{title} – {data['model']['name']}", data), data


def file_name(path: str | os.PathLike[str]) -> str:
    """Return a file name as text; undecodable bytes become �."""
    return os.fsencode(Path(path).name).decode("utf-8", "replace")


class Written(NamedTuple):
    """A report that was written, or why it was not.

    Attributes:
        picture: Path of the picture.
        page: File name of the report; None if there is none.
        error: What went wrong; None if nothing did.
    """

    picture: str
    page: str | None
    error: str | None


def write_reports(
    client: Client, pictures: Sequence[str], folder: Path, *, model: str, options: Options
) -> Iterator[Written]:
    """Write a report for each picture, and `index.html`, which lists them with their scores.

    A picture that fails is listed with its error. A missing folder is created, files of an earlier run are replaced.

    Yields:
        What became of each picture, in order; the index is written after the last one.

    Raises:
        ConvscopeError: The card could not be fetched, or the service failed; a note says after how many pictures.
        OSError: The folder or a page cannot be written.
    """
    card = client.model_card(model, options.version)
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    digits = len(str(len(pictures)))
    for number, path in enumerate(pictures, 1):
        is_piped = path == STANDARD_INPUT
        title = "standard input" if is_piped else file_name(path)
        entry: dict[str, Any] = {"title": title, "page": None, "thumbnail": None, "scores": [], "notes": []}
        entry["error"] = None
        try:
            file = encode_one_picture(sys.stdin.buffer.read() if is_piped else path)
            entry["thumbnail"] = thumbnail(file)
            page, data = _page(client, file, card, model, title, options)
        except (ConvscopeError, OSError, ValueError) as error:
            code = "unreadable"
            if isinstance(error, ConvscopeError):
                so_far = f"{number - 1:,} of {len(pictures):,} pictures were done before"
                raise_if_of_service(error, lambda: client.model_card(model, options.version), so_far)
                code = error.code
            message = getattr(error, "strerror", None) or str(error)
            entry["error"] = f"{code}: {message}"
        else:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(title).stem).strip(".-") or "picture"
            entry["page"] = f"{number:0{digits}}-{stem}.html"
            entry["scores"], entry["notes"] = data["scores"], data["notes"]
            (folder / entry["page"]).write_text(page, "utf-8")
        entries.append(entry)
        yield Written(path, entry["page"], entry["error"])
    heading = f"{len(pictures)} pictures – {card.model}"
    index = {"index": entries, "title": heading, "model": {"name": card.model, "description": card.description}}
    (folder / "index.html").write_text(page_html(heading, index), "utf-8")
