"""The sub-commands of this package: `convscope report`, `ui`, `probe` and `filters`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope._cli_common import METHODS, as_json, name, names, numbers
from convscope._table import printable

if TYPE_CHECKING:
    from convscope._client import Client

KINDS = {
    "shift": ("shifts", "how maps and predictions follow moved pictures; steps are pixels"),
    "rotate": ("angles", "how scores and maps change as pictures turn; steps are degrees"),
    "scale": ("factors", "how scores and maps change as pictures grow and shrink; steps are factors"),
    "border": (None, "what padding does near the border; has no steps"),
    "blur": ("radii", "what is left as pictures are blurred; steps are pixels"),
    "shuffle": ("blocks", "what is left as pictures are cut and their blocks change places; steps are pixels"),
}


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add `report` to the command line."""
    parser = commands.add_parser("report", help="what a model sees in a picture, as one page of HTML")
    parser.add_argument("picture", metavar="PICTURE", help="a PNG, JPEG, WebP or .npy file")
    parser.add_argument("--model", required=True, type=name)
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
    parser.add_argument("--model", required=True, type=names, metavar="A,B", help="the models to offer")
    parser.add_argument("--port", default=0, type=int, help="where to listen on 127.0.0.1 (default: a free port)")
    parser.set_defaults(run=_ui)
    return parser


def _report(client: Client, options: argparse.Namespace) -> int:
    """Write the page."""
    from convscope_lens._page.report import report

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
    from convscope_lens._page.server import PageServer

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


def add_probe(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line's others, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "probe",
        help="what a model does as pictures move, turn, grow, blur, break up, or meet their border",
        description="\n".join(f"{name}: {says}" for name, (_, says) in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS))
    parser.add_argument("pictures", nargs="+", metavar="PICTURE|FOLDER", help="PNG, JPEG, WebP or .npy files")
    parser.add_argument("--model", required=True, type=name)
    parser.add_argument("--layers", default="all", type=names, metavar="A,B|all", help="whose maps (default all)")
    parser.add_argument("--steps", type=numbers, metavar="A,B,...", help="how far to change the pictures")
    parser.add_argument("--limit", type=int, metavar="N", help="probe with N of the pictures, chosen at random")
    parser.add_argument("--seed", default=0, type=int, help="of all random choices (default 0)")
    parser.add_argument("--save", metavar="DIR", help="write <kind>-<model>.png and .json there")
    parser.set_defaults(run=_probe)
    return parser


def _probe(client: Client, options: argparse.Namespace) -> int:
    """Probe, print and save; return the exit status."""
    arguments: dict[str, Any] = {}
    steps, _ = KINDS[options.kind]
    if options.steps is not None:
        if steps is None:
            raise ValueError(f"probe {options.kind} has no steps")
        whole = options.kind in ("shift", "shuffle")
        if whole and any(step != int(step) for step in options.steps):
            raise ValueError(f"{steps} are whole pixels")
        arguments[steps] = [int(step) for step in options.steps] if whole else options.steps
    if options.limit is not None and options.limit < 1:
        raise ValueError("--limit must be at least 1")
    try:
        from convscope_lens import probes

        if options.save is not None:
            import matplotlib  # noqa: F401  # What is missing is said before a long probe, not after it.
        found = getattr(probes, options.kind)(
            client,
            options.pictures,
            model=options.model,
            version=options.version,
            layers=options.layers,
            limit=options.limit,
            seed=options.seed,
            **arguments,
        )
    except ImportError as error:
        print(f"convscope: {error}; pip install 'convscope[figure]' brings it", file=sys.stderr)
        return 1
    text = as_json(found.to_dict())
    print(text if options.json else found.table())
    if options.save is not None:
        folder = Path(options.save)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{found.name}-{Path(found.model).name}"
        (folder / f"{stem}.json").write_text(text + "\n", "utf-8")
        found.figure().savefig(folder / f"{stem}.png", dpi=110)
        if not options.json:
            print("\n" + printable(f"saved {folder / stem}.png and .json"))
    return 0


def add_filters(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line's others, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "filters", help="a convolution's kernels, and what they answer to in frequency"
    )
    parser.add_argument("model", type=name)
    parser.add_argument("--layer", metavar="NAME", help="whose kernels (default: the model's first layer)")
    parser.add_argument("--save", metavar="DIR", help="write <model>-<layer>-kernels.png and -spectra.png there")
    parser.set_defaults(run=_filters)
    return parser


def _filters(client: Client, options: argparse.Namespace) -> int:
    """Fetch the kernels, print and save; return the exit status."""
    from convscope_lens.filters import peaks, peaks_text

    layer = options.layer or client.model_card(options.model, options.version).layers[0].name
    kernels = client.filters(options.model, layer, options.version, request_id=options.request_id)
    found = peaks(kernels)
    if options.json:
        values = {"model": options.model, "layer": layer, "shape": list(kernels.shape), "kernels": kernels.tolist()}
        print(as_json(values | {"peaks": [peak.to_dict() for peak in found]}, indent=None))
    else:
        print(peaks_text(found, f"{options.model}, {layer}: {'×'.join(map(str, kernels.shape))} kernels"))
    if options.save is None:
        return 0
    try:
        from convscope_lens._filters_figure import draw_kernels, draw_spectra
    except ImportError:
        print("convscope: figures are drawn with matplotlib: pip install 'convscope[figure]'", file=sys.stderr)
        return 1
    folder = Path(options.save)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(options.model).name}-{Path(layer).name}"
    title = f"{options.model}, {layer}"
    draw_kernels(kernels, title=title).savefig(folder / f"{stem}-kernels.png", dpi=110)
    draw_spectra(kernels, title=title).savefig(folder / f"{stem}-spectra.png", dpi=110)
    if not options.json:
        print("\n" + printable(f"saved {folder / stem}-kernels.png and -spectra.png"))
    return 0
