"""Assembles the page: one HTML document that holds its script, its style and its data."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body>
<noscript><p>This page needs JavaScript.</p></noscript>
<div id="page"></div>
<script type="application/json" id="data">{{data}}</script>
<script type="application/json" id="settings">{{settings}}</script>
<script>{{script}}</script>
</body>
</html>
"""


def page_html(title: str, data: dict[str, Any] | None, *, settings: dict[str, Any] | None = None) -> str:
    """Assemble the page.

    Args:
        title: Title of the document; any text.
        data: What the page shows at once; None for nothing.
        settings: Of the live page; None for a report, which may not connect to anything.

    Returns:
        A self-contained HTML document. Its content security policy allows only the script and the style of this
        package.
    """
    parts = {
        "policy": content_security_policy(connect=settings is not None),
        "title": html.escape(title),
        "style": _read("page.css"),
        "script": _read("page.js"),
        "data": _escaped_json(data),
        "settings": _escaped_json(settings),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _DOCUMENT)


def content_security_policy(*, connect: bool) -> str:
    """Return the content security policy of a page; `connect` allows requests to the page's own origin."""
    rules = {
        "default-src": "'none'",
        "script-src": _digest("page.js"),
        "style-src": _digest("page.css"),
        "img-src": "data:",
        "connect-src": "'self'" if connect else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@functools.cache
def _digest(name: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(_read(name).encode()).digest()).decode()}'"


def _escaped_json(value: Any) -> str:
    """Return JSON that is safe inside <script>, where `<` could end the element or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _read(name: str) -> str:
    return files("convscope_lens._page").joinpath(name).read_text("utf-8")
