"""`convscope report` and `convscope ui`."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from convscope._cli_common import METHODS, as_json, model, models, names
from convscope._table import printable

if TYPE_CHECKING:
    import argparse

    from convscope._client import Client


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add `report` to the command line."""
    parser = commands.add_parser("report", help="what a model sees in a picture, as one page of HTML")
    parser.add_argument("picture", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--out", required=True, metavar="FILE", help="the page to write; it is replaced if it exists")
    parser.add_argument("--layers", default="all", type=names, metavar="A,B|all", help="layers to show (default all)")
    methods = (*METHODS, "none")
    parser.add_argument("--method", default="grad_cam", choices=methods, help="how to explain (default %(default)s)")
    parser.add_argument("--target", type=int, metavar="INDEX", help="the class to explain (default: the first)")
    parser.set_defaults(run=_report)
    return parser


def add_ui(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add `ui` to the command line."""
    parser = commands.add_parser("ui", help="a page to drop pictures on and to draw on, on this machine")
    parser.add_argument("--model", required=True, type=models, metavar="A,B", help="the models to offer")
    parser.add_argument("--port", default=0, type=int, help="where to listen on 127.0.0.1 (default: a free port)")
    parser.set_defaults(run=_ui)
    return parser


def _report(client: Client, options: argparse.Namespace) -> int:
    """Write the page."""
    from convscope._page.report import report

    page = report(
        client,
        options.picture,
        model=options.model,
        version=options.version,
        layers=options.layers,
        method=None if options.method == "none" else options.method,
        target=options.target,
        request_id=options.request_id,
    ).encode()
    Path(options.out).write_bytes(page)
    written = {"report": options.out, "bytes": len(page)}
    print(as_json(written) if options.json else printable(f"wrote {options.out}, {len(page):,} bytes"))
    return 0


def _ui(client: Client, options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    from convscope._page.server import PageServer

    if not 0 <= options.port < 1 << 16:
        raise ValueError(f"there is no port {options.port}")
    for number in (signal.SIGINT, signal.SIGTERM):  # A shell has SIGINT ignored in what it runs in the background.
        signal.signal(number, signal.default_int_handler)
    with PageServer(client, options.model, version=options.version, port=options.port) as server:
        address = json.dumps({"url": server.url}) if options.json else f"open {server.url}\nCtrl-C ends it"
        print(address, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
