"""Builds the report: a self-contained HTML file with the scores, maps and heat map of one picture."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope_lens._page.page_data import encode_one_picture, fetch_page_data

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convscope import Client
    from convscope.typing import Method, Picture

MAX_MAP_VALUES = 6 << 20  # All maps together; as base64 they are 8 MiB of the file.


def report(
    client: Client,
    picture: Picture,
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    method: Method | None = "grad_cam",
    target: int | None = None,
    title: str | None = None,
    request_id: str | None = None,
) -> str:
    """Predict and explain a picture, and return the result as one HTML page.

    Args:
        client: An open client; makes three requests (card, predict, explain).
        picture: One picture, as in `Client.predict`.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Layers to show: names, one name, or `"all"`. If the maps are too large for a page, it shows the
            strongest channels of each layer.
        method: Method of the heat map, as in `Client.explain`; None for none. If the model does not support Grad-CAM,
            the default, the page has no heat map. With an explicit `method` or `target` the error is raised.
        target: Index of the class to explain; None for the most probable one.
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
        title = _file_name(picture) if isinstance(picture, str | os.PathLike) else "picture"
    data = fetch_page_data(
        client,
        file,
        client.model_card(model, version),
        model=model,
        title=title,
        max_values=MAX_MAP_VALUES,
        layers=layers if isinstance(layers, str) else list(layers),
        version=version,
        method=method,
        target=target,
        request_id=request_id,
    )
    return page_html(f"{title} – {data['model']['name']}", data)


def _file_name(path: str | os.PathLike[str]) -> str:
    """Return a file name as text; undecodable bytes become �."""
    return os.fsencode(Path(path).name).decode("utf-8", "replace")


def page_html(title: str, data: dict[str, Any] | None, *, controls: dict[str, Any] | None = None) -> str:
    """Assemble the page from the files in this package.

    Args:
        title: Title of the document; any text.
        data: Initial data of the page; None for none.
        controls: Settings of the interactive page; None for a report, which may not connect to anything.

    Returns:
        A self-contained HTML document. Its content security policy allows only the script and the style of this
        package.
    """
    style = _read("page.css")
    script = _read("page.js") + ("" if controls is None else _read("controls.js"))
    parts = {
        "policy": content_security_policy(connect=controls is not None),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "controls": "" if controls is None else _read("controls.html"),
        "data": _escaped_json(data),
        "settings": _escaped_json(controls),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def content_security_policy(*, connect: bool) -> str:
    """Return the content security policy of a page; `connect` allows requests to the page's own origin."""
    script = _read("page.js") + (_read("controls.js") if connect else "")
    rules = {
        "default-src": "'none'",
        "script-src": _digest(script),
        "style-src": _digest(_read("page.css")),
        "img-src": "data:",
        "connect-src": "'self'" if connect else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escaped_json(value: Any) -> str:
    """Return JSON that is safe inside <script>, where `<` could end the element or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _read(name: str) -> str:
    return files("convscope_lens._page").joinpath(name).read_text("utf-8")
