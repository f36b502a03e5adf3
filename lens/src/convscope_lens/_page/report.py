"""The report: one HTML file of what a network sees in a picture. It needs neither the service nor the internet."""

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

from convscope_lens._page.scene import fetch_scene, read_picture

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convscope import Client
    from convscope.typing import Method, Picture

MAX_CELLS = 6 << 20  # Of all maps together: the file is 8 MB at most, besides the picture.


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
        client: A connected client. It is asked for the model card, for scores and maps, and for an explanation.
        picture: One picture, as in `Client.predict`.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Layers to show: names, one name, or `"all"`. Where the maps are too large for a page, the strongest
            channels of each layer are shown.
        method: How to explain the score, as in `Client.explain`; None for no heat map.
        target: Index of the class to explain; None for the most probable one. If the service cannot explain, the page
            has no heat map; but if a target, or a method other than grad_cam, was given, the error is raised.
        title: Title of the picture; None for the name of its file.
        request_id: Id of the request for scores and maps, as in `Client.predict`.

    Returns:
        The HTML document. It loads nothing from anywhere.

    Raises:
        ConvscopeError: The service rejected a request, or did not respond.
        OSError: A path cannot be read.
        TypeError: It is not a picture.
        ValueError: An array or an option is out of range, or there are several pictures.
    """
    file = read_picture(picture)
    if title is None:
        title = _file_name(picture) if isinstance(picture, str | os.PathLike) else "picture"
    scene = fetch_scene(
        client,
        file,
        client.model_card(model, version),
        model=model,
        title=title,
        max_cells=MAX_CELLS,
        layers=layers if isinstance(layers, str) else list(layers),
        version=version,
        method=method,
        target=target,
        request_id=request_id,
    )
    return page_html(f"{title} seen by {scene['model']['name']}", scene)


def _file_name(path: str | os.PathLike[str]) -> str:
    """Return a file's name as text; bytes in it that are not text become �."""
    return os.fsencode(Path(path).name).decode("utf-8", "replace")


def page_html(title: str, scene: dict[str, Any] | None, *, controls: dict[str, Any] | None = None) -> str:
    """Assemble the page from the files beside this module.

    Args:
        title: Title of the document; any text.
        scene: The data that the page shows at first; None for nothing yet.
        controls: Settings of the interactive page; None for a report, which may not connect to anything.

    Returns:
        An HTML document that loads nothing. The scene is in it as JSON without `<`, so no text in it can end the
        script element. The content security policy allows only the script and the style of this package.
    """
    style = _read("page.css")
    script = _read("page.js") + ("" if controls is None else _read("controls.js"))
    parts = {
        "policy": content_security_policy(connect=controls is not None),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "controls": "" if controls is None else _read("controls.html"),
        "scene": _script_json(scene),
        "settings": _script_json(controls),
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


def _script_json(value: Any) -> str:
    """Return JSON for a script element: in it, a `<` could end the element or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _read(name: str) -> str:
    return files("convscope_lens._page").joinpath(name).read_text("utf-8")
