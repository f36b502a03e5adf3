"""The page's HTML, put together out of the files beside this module; nothing is loaded from anywhere else."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any


def page_html(title: str, scene: dict[str, Any] | None, *, controls: dict[str, Any] | None = None) -> str:
    """Put a page together.

    Args:
        title: Of the document; any text.
        scene: What it shows at first; None for nothing yet.
        controls: What the page to play with starts from; None for a page without controls, which is then not allowed
            to connect to anything.

    Returns:
        A document that refers to no other. Its scene stands in it as JSON, which HTML cannot mistake for a tag; only
        the script and the style of this package may run, known by their digests.
    """
    style = _read("page.css")
    script = _read("page.js") + ("" if controls is None else _read("controls.js"))
    parts = {
        "policy": policy(connect=controls is not None),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "controls": "" if controls is None else _read("controls.html"),
        "scene": _json(scene),
        "settings": _json(controls),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def policy(*, connect: bool) -> str:
    """Return the content security policy of a page; only one with controls may connect, to where it came from."""
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


def _json(value: Any) -> str:
    """Return JSON that may stand in a script element: in it a `<` could end the element, or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _read(name: str) -> str:
    return files("convscope_lens._page").joinpath(name).read_text("utf-8")
