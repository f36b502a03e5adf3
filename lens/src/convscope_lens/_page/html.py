"""Assembles the pages: each is one HTML document that holds its style, its data and, of the report, its script."""

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
{{body}}
</body>
</html>
"""

_REPORT = """<noscript><p>This page needs JavaScript.</p></noscript>
<div id="page"></div>
<script type="application/json" id="data">{{data}}</script>
<script type="application/json" id="settings">{{settings}}</script>
<script>{{script}}</script>"""


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
    parts = {"script": _read("page.js"), "data": _escaped_json(data), "settings": _escaped_json(settings)}
    policy = content_security_policy(connect=settings is not None)
    return _document(title, policy, _read("page.css"), _fill(_REPORT, parts))


def static_html(title: str, style: str, body: str) -> str:
    """Assemble a page without a script.

    Args:
        title: Title of the document; any text.
        style: File of this package that is added to the report's style sheet.
        body: HTML; what is text in it is escaped already.

    Returns:
        A self-contained HTML document. Its content security policy allows its style and pictures that it holds.
    """
    styles = _read("page.css") + _read(style)
    rules = {
        "default-src": "'none'",
        "style-src": _sha256(styles),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return _document(title, _policy(rules), styles, body)


def _document(title: str, policy: str, style: str, body: str) -> str:
    return _fill(_DOCUMENT, {"policy": policy, "title": html.escape(title), "style": style, "body": body})


def _fill(document: str, parts: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], document)


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
    return _policy(rules)


def _policy(rules: dict[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@functools.cache
def _digest(name: str) -> str:
    return _sha256(_read(name))


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escaped_json(value: Any) -> str:
    """Return JSON that is safe inside <script>, where `<` could end the element or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _read(name: str) -> str:
    return files("convscope_lens._page").joinpath(name).read_text("utf-8")
