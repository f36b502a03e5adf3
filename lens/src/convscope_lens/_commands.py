"""The sub-commands that this package adds to `convscope`.

    convscope report cat.png --model cifar --out report.html
    convscope ui --model cifar,digits
    convscope probe shift pictures/ --model cifar --save probes
    convscope filters cifar --save filters
    convscope strongest samples/*.png --model cifar --layer conv2 --channel 3 --save patches

`convscope` finds them through the entry points in pyproject.toml. They import numpy and matplotlib only when they run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope.commands import (
    METHODS,
    Failure,
    SubParsers,
    add_request_id,
    check_absent,
    format_json,
    format_table,
    model,
    models,
    name,
    names,
    printable,
    read_pictures,
)

if TYPE_CHECKING:
    from convscope import Client, ConvscopeError

    from convscope_lens.patches import Patch

PROBES = {
    "shift": ("shifts", "how maps and predictions follow moved pictures; steps are pixels"),
    "rotate": ("angles", "how scores and maps change as pictures turn; steps are degrees"),
    "scale": ("factors", "how scores and maps change as pictures grow and shrink; steps are factors"),
    "border": (None, "how padding changes maps near the border; has no steps"),
    "blur": ("radii", "how scores and maps change as pictures are blurred; steps are pixels"),
    "shuffle": ("blocks", "how scores and maps change as blocks of pictures change places; steps are pixels"),
}
_PICTURE = "a PNG, JPEG, WebP or .npy file"


def add_report(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope report`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report", help="scores, maps and heat map of a picture, as one HTML file"
    )
    parser.add_argument("picture", metavar="PICTURE", help=_PICTURE)
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML file to write; replaced if it exists")
    parser.add_argument("--layers", default="all", type=names, metavar="A,B|all", help="layers to show (default all)")
    methods = (*METHODS, "none")
    parser.add_argument("--method", default="grad_cam", choices=methods, help="how to explain (default %(default)s)")
    parser.add_argument("--target", type=int, metavar="INDEX", help="the class to explain (default: the most probable)")
    add_request_id(parser)
    parser.set_defaults(run=_report)
    return parser


def _report(client: Client, options: argparse.Namespace) -> int:
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
    print(format_json(written) if options.json else printable(f"wrote {options.out}, {len(page):,} bytes"))
    return 0


def add_ui(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope ui`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ui", help="a web page on this machine, to drop pictures on and to draw on"
    )
    parser.add_argument("--model", required=True, type=models, metavar="A,B", help="the models to offer")
    parser.add_argument("--port", default=0, type=int, help="port to listen on at 127.0.0.1 (default: a free port)")
    parser.set_defaults(run=_ui)
    return parser


def _ui(client: Client, options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    from convscope_lens._page.server import PageServer

    if not 0 <= options.port < 1 << 16:
        raise ValueError(f"there is no port {options.port}")
    for number in (signal.SIGINT, signal.SIGTERM):  # In the background of a shell, SIGINT would be ignored.
        signal.signal(number, signal.default_int_handler)
    with PageServer(client, options.model, version=options.version, port=options.port) as server:
        address = json.dumps({"url": server.url}) if options.json else f"open {server.url}\nCtrl-C ends it"
        print(address, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def add_probe(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope probe`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "probe",
        help="how scores and maps change as pictures move, turn, grow, blur or break up",
        description="\n".join(f"{kind}: {description}" for kind, (_, description) in PROBES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=PROBES, metavar="|".join(PROBES))
    parser.add_argument("pictures", nargs="+", metavar="PICTURE|FOLDER", help="PNG, JPEG, WebP or .npy files")
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--layers", default="all", type=names, metavar="A,B|all", help="layers to use (default all)")
    parser.add_argument("--steps", type=numbers, metavar="A,B,...", help="how much to change the pictures")
    parser.add_argument("--limit", type=int, metavar="N", help="use N of the pictures, chosen at random")
    parser.add_argument("--seed", default=0, type=int, help="seed of all random choices (default 0)")
    parser.add_argument("--save", metavar="DIR", help="write <kind>-<model>.png and .json there")
    parser.set_defaults(run=_probe)
    return parser


def numbers(text: str) -> list[float]:
    """Read `1,2,4`."""
    found = [float(number) for number in text.split(",") if number.strip()]
    if not found or not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"finite numbers, as in 1,2,4, not {text!r}")
    return found


def _probe(client: Client, options: argparse.Namespace) -> int:
    arguments: dict[str, Any] = {}
    steps, _ = PROBES[options.kind]
    if options.steps is not None:
        if steps is None:
            raise ValueError(f"probe {options.kind} has no steps")
        whole = options.kind in ("shift", "shuffle")
        if whole and any(step != int(step) for step in options.steps):
            raise ValueError(f"{steps} are whole pixels")
        arguments[steps] = [int(step) for step in options.steps] if whole else options.steps
    if options.limit is not None and options.limit < 1:
        raise ValueError("--limit must be at least 1")
    from convscope_lens import probes

    found: probes.Probe = getattr(probes, options.kind)(
        client,
        options.pictures,
        model=options.model,
        version=options.version,
        layers=options.layers,
        limit=options.limit,
        seed=options.seed,
        **arguments,
    )
    text = format_json(found.to_dict())
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


def add_filters(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope filters`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "filters", help="the kernels of a convolution, and the frequency that each lets through most"
    )
    parser.add_argument("model", type=model)
    parser.add_argument("--layer", metavar="NAME", help="the layer (default: the model's first layer)")
    parser.add_argument("--save", metavar="DIR", help="write <model>-<layer>-kernels.png and -spectra.png there")
    add_request_id(parser)
    parser.set_defaults(run=_filters)
    return parser


def _filters(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens.filters import draw_kernels, draw_spectra, peaks, peaks_text

    layer = options.layer or client.model_card(options.model, options.version).layers[0].name
    kernels = client.filters(options.model, layer, options.version, request_id=options.request_id)
    found = peaks(kernels)
    if options.json:
        values = {"model": options.model, "layer": layer, "shape": list(kernels.shape), "kernels": kernels.tolist()}
        print(format_json(values | {"peaks": [peak.to_dict() for peak in found]}, indent=None))
    else:
        print(peaks_text(found, f"{options.model}, {layer}: {'×'.join(map(str, kernels.shape))} kernels"))
    if options.save is not None:
        folder = Path(options.save)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{Path(options.model).name}-{Path(layer).name}"
        title = f"{options.model}, {layer}"
        draw_kernels(kernels, title=title).savefig(folder / f"{stem}-kernels.png", dpi=110)
        draw_spectra(kernels, title=title).savefig(folder / f"{stem}-spectra.png", dpi=110)
        if not options.json:
            print("\n" + printable(f"saved {folder / stem}-kernels.png and -spectra.png"))
    return 0


def add_strongest(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope strongest`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "strongest", help="the parts of pictures that a channel responds to most"
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=_PICTURE)
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--layer", required=True, type=name)
    parser.add_argument("--channel", required=True, type=int, metavar="C")
    parser.add_argument("-n", default=9, type=int, help="how many cells (default %(default)s)")
    parser.add_argument("--per-picture", default=1, type=int, metavar="N", help="at most so many of one picture (1)")
    parser.add_argument("--save", metavar="DIR", help="write each patch as a PNG to a new directory")
    parser.set_defaults(run=_strongest)
    return parser


def _strongest(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens.patches import strongest

    if options.save is not None:
        check_absent(Path(options.save))
    pictures = read_pictures(options.pictures)
    failed = [(name, file) for name, file in pictures if isinstance(file, Failure)]
    readable = [(name, file) for name, file in pictures if isinstance(file, bytes)]
    errors: dict[int, ConvscopeError] = {}
    patches = strongest(
        client,
        [file for _, file in readable],
        model=options.model,
        version=options.version,
        layer=options.layer,
        channel=options.channel,
        n=options.n,
        per_picture=options.per_picture,
        errors=errors,
    )
    failed += [(readable[number][0], Failure(error.code, error.message)) for number, error in errors.items()]
    found = [(readable[patch.picture][0], patch) for patch in patches]
    saved = [] if options.save is None else _save_patches(patches, Path(options.save))
    if options.json:
        print(format_json(_patches_json(found, failed, saved)))
    else:
        print(_patches_text(found, failed, saved))
    return 1 if failed else 0


def _save_patches(patches: list[Patch], folder: Path) -> list[Path]:
    """Write each patch as a PNG into a new folder, named by its rank."""
    from convscope.pixels import encode_png

    folder.mkdir(parents=True)
    files = [folder / f"{rank:03}.png" for rank in range(1, len(patches) + 1)]
    for file, patch in zip(files, patches, strict=True):
        image = patch.image()
        file.write_bytes(encode_png(image if image.shape[2] in (1, 3) else image[:, :, :1]))
    return files


def _patches_text(found: list[tuple[str, Patch]], failed: list[tuple[str, Failure]], saved: list[Path]) -> str:
    """Return patches as a table, followed by the pictures that failed."""
    rows = []
    for rank, (picture, patch) in enumerate(found, 1):
        top, left, bottom, right = patch.box
        place = [f"{patch.cell[0]}, {patch.cell[1]}", f"{top} to {bottom - 1}, {left} to {right - 1}"]
        rows.append([str(rank), f"{patch.value:.4g}", picture, *place])
    rows += [["–", "–", picture, str(error)] for picture, error in failed]
    text = format_table(["rank", "value", "picture", "cell", "pixels (rows, columns)"], rows, right=(0, 1))
    return f"{text}\n\nsaved {printable(str(saved[0].parent))}" if saved else text


def _patches_json(
    found: list[tuple[str, Patch]], failed: list[tuple[str, Failure]], saved: list[Path]
) -> dict[str, Any]:
    """Return patches for programs, without their pixels, and the pictures that failed."""
    patches = []
    for rank, (picture, patch) in enumerate(found):
        values = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
        del values["pixels"]
        patches.append(values | {"picture": picture, "saved": str(saved[rank]) if saved else None})
    return {
        "patches": patches,
        "failed": [{"picture": picture, "error": error._asdict()} for picture, error in failed],
    }
